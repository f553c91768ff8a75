"""Quantise an original in several ways, evaluate every result on several texts, write one table.

Shared by the programs for the real and for the tiny model. Each run is also a line of JSON in
results.jsonl of the work folder, with all figures and times.
"""

import argparse
import ast
import inspect
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import erniequant
from benchmarks.real_model import evaluation
from benchmarks.real_model.texts import NGRAM, Text, overlap

Result = TypeVar("Result")
Settings = dict[str, Any]
OWN = {"src", "dst", "bits", "seed", "calib", "calib_samples", "calib_length", "effort"}


@dataclass(frozen=True)
class Recipe:
    """How to quantise; ``settings`` are further options of `erniequant.quantize`."""

    bits: int
    seed: int
    effort: str
    settings: Settings = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([f"{self.bits}bits", f"seed{self.seed}", self.effort, *self.extra])

    @property
    def extra(self) -> list[str]:
        """The settings as they were given."""
        return [f"{key}={value}" for key, value in self.settings.items()]


@dataclass(frozen=True)
class Bench:
    """The folder of the original, what it computes on every text, and how runs are calibrated."""

    work: Path
    folder: Path
    texts: tuple[tuple[Text, evaluation.Original], ...]
    calib: str
    samples: int
    length: int


def add_options(parser: argparse.ArgumentParser, texts: Iterable[str], samples: int) -> None:
    """Options of both programs."""
    names = tuple(texts)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything big")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--texts", nargs="*", choices=names, default=list(names))
    parser.add_argument("--tokens", type=int, help="evaluate on fewer tokens of each text")
    parser.add_argument("--samples", type=int, default=samples, help="calibration windows")
    parser.add_argument("--effort", default="standard")
    parser.add_argument(
        "--set", action="append", default=[], type=settings, metavar="KEY=VALUE[,KEY=VALUE]",
        help="other options of erniequant.quantize, for all runs",
    )  # fmt: skip


def settings(text: str) -> Settings:
    """``key=value`` pairs between commas; a value is Python's or else text.

    Raises:
        argparse.ArgumentTypeError: not in this form, or no free option of `erniequant.quantize`.
    """
    found: Settings = {}
    for pair in filter(None, text.split(",")):
        key, equal, value = pair.partition("=")
        if not equal:
            raise argparse.ArgumentTypeError(f"{pair!r} is not KEY=VALUE")
        if key in OWN:
            raise argparse.ArgumentTypeError(f"{key}: this program has its own option for it")
        if key not in inspect.signature(erniequant.quantize).parameters:
            raise argparse.ArgumentTypeError(f"{key}: erniequant.quantize has no such option")
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value
    return found


def merged(parts: Iterable[Settings]) -> Settings:
    """All settings together; a later one wins."""
    return {key: value for part in parts for key, value in part.items()}


def measured(
    work: Path, folder: Path, texts: Sequence[Text], calibration: torch.Tensor
) -> tuple[tuple[Text, evaluation.Original], ...]:
    """The original on every text; exits if a text overlaps the ids that calibration may use."""
    results = []
    for text in texts:
        share = overlap(text.ids, calibration)
        print(
            f"{text.name}: {len(text.ids):,} tokens, sha256 of the text {text.sha256}, "
            f"{share:.2%} of its {NGRAM}-grams occur in the calibration text"
        )
        if share:
            sys.exit(f"the text {text.name} overlaps the calibration text")
        original, seconds = timed(evaluation.original, folder, text.windows, work / "originals")
        print(
            f"{text.name}: perplexity of the original {original.perplexity:.3f} "
            f"on {len(original.loss):,} tokens ({seconds:.0f} s)",
            flush=True,
        )
        results.append((text, original))
    return tuple(results)


def quantised(bench: Bench, recipes: Iterable[Recipe]) -> list[dict[str, Any]]:
    """Quantise and evaluate by each recipe. An unfinished run is continued, a finished one is done
    again. Packed folders stay in ``packed`` of the work folder."""
    entries = []
    for recipe in recipes:
        name = f"{bench.folder.name}-{recipe}-{bench.samples}".replace("/", "_")
        packed = bench.work / "packed" / name
        if (packed / "config.json").is_file():
            shutil.rmtree(packed)
        report, seconds = timed(
            erniequant.quantize, bench.folder, packed, bits=recipe.bits, seed=recipe.seed,
            effort=recipe.effort, calib=bench.calib, calib_samples=bench.samples,
            calib_length=bench.length, **recipe.settings,
        )  # fmt: skip
        entry = {
            "model": bench.folder.name, **asdict(recipe), "folder": str(packed),
            "calibration_tokens": report.calibration.tokens if report.calibration else 0,
            "quantize_seconds": report.seconds, "wall_seconds": seconds,
            "layer_seconds": report.layer_seconds, "peak_memory_bytes": report.peak_memory_bytes,
        }  # fmt: skip
        entries.append(record(bench, entry, packed))
    return entries


def print_seeds(bench: Bench, bits: int, options: argparse.Namespace, more: Settings) -> None:
    """Quantise with every seed, print a row for each, and one of their mean if there are several.

    options: from a parser with `add_options`.
    """
    recipes = [Recipe(bits, seed, options.effort, more) for seed in options.seeds]
    entries = quantised(bench, recipes)
    if len(entries) > 1:
        print(mean_row(entries), flush=True)


def record(bench: Bench, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Evaluate a folder, as a bf16 export if it is packed; print its row and keep its figures."""
    plain = folder
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        plain = bench.work / "plain" / folder.name
        shutil.rmtree(plain, ignore_errors=True)
        _, entry["export_seconds"] = timed(erniequant.export, folder, plain, to="bf16")
    model, entry["load_seconds"] = timed(evaluation.load, plain)
    entry["original"], entry["texts"] = str(bench.folder), {}
    for text, original in bench.texts:
        figures, seconds = timed(evaluation.compare, model, text.windows, original)
        entry["texts"][text.name] = {
            **asdict(figures), "original_perplexity": original.perplexity,
            "sha256": text.sha256, "seconds": seconds,
        }  # fmt: skip
    print(row(entry), flush=True)
    with (bench.work / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **entry}) + "\n")
    if plain != folder:
        shutil.rmtree(plain)
    return entry


def heading(texts: Iterable[str]) -> str:
    """The first two rows of the table: ratio of perplexities, KL and top-1 for each text."""
    columns = ["model", "bits", "seed", "options"]
    for name in texts:
        columns += [f"{name}: ratio", "KL", "top-1"]
    return f"| {' | '.join([*columns, 'seconds'])} |\n{'|---' * (len(columns) + 1)}|"


def row(entry: dict[str, Any]) -> str:
    """A row of the table; errors are standard errors clustered by window."""
    extra = ", ".join(f"{key}={value}" for key, value in entry.get("settings", {}).items())
    cells = [entry["model"], entry.get("bits", ""), entry.get("seed", ""), extra]
    for figures in entry["texts"].values():
        cells += [
            f"{figures['ratio']:.4f} ± {figures['ratio_error']:.4f}",
            f"{figures['kl']:.4f} ± {figures['kl_error']:.4f}",
            f"{figures['top']:.1%}",
        ]
    seconds = entry.get("quantize_seconds")
    cells.append("" if seconds is None else f"{seconds:.0f}")
    return f"| {' | '.join(map(str, cells))} |"


def mean_row(entries: Sequence[dict[str, Any]]) -> str:
    """A row for runs that differ by seed: geometric mean of ratios, other means, and in the place
    of standard errors the standard deviation over seeds."""
    texts = {}
    for name in entries[0]["texts"]:
        runs = [entry["texts"][name] for entry in entries]
        logs, kl = [math.log(run["ratio"]) for run in runs], [run["kl"] for run in runs]
        ratio = math.exp(statistics.mean(logs))
        texts[name] = {
            "ratio": ratio, "ratio_error": ratio * statistics.stdev(logs),
            "kl": statistics.mean(kl), "kl_error": statistics.stdev(kl),
            "top": statistics.mean(run["top"] for run in runs),
        }  # fmt: skip
    seconds = statistics.mean(entry["quantize_seconds"] for entry in entries)
    same = {key: entries[0][key] for key in ("model", "bits", "settings")}
    return row(
        {**same, "seed": f"mean of {len(entries)}", "texts": texts, "quantize_seconds": seconds}
    )


def timed(function: Callable[..., Result], *args: Any, **named: Any) -> tuple[Result, float]:
    """The result and the seconds it took."""
    begin = time.perf_counter()
    return function(*args, **named), time.perf_counter() - begin
