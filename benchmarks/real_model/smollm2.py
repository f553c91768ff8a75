"""Measure quantisation on a real 135M-parameter language model cut into an ERNIE 4.5 MoE.

    pip install gguf
    python -m benchmarks.real_model.smollm2 --work DIR [--bits 2 3 4] [--seeds 0 1 2] [--sparse]
    python -m benchmarks.real_model.smollm2 --work DIR --evaluate FOLDER ...

The original is SmolLM2-135M-Instruct (Apache-2.0), made by `source.py` and `model.py`; ``--sparse``
makes two copies of every expert, and learned routers send each token to one of them (`routers.py`).
Calibration uses the English texts that come with erniequant, evaluation those of `texts.py`. The
program prints a row of a markdown table per quantised model and adds a line of JSON to
DIR/results.jsonl.
"""

import argparse
import ast
import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import erniequant
import erniequant_data
from benchmarks.real_model import evaluation, model, routers, source, texts

Result = TypeVar("Result")


@dataclass(frozen=True)
class Bench:
    """The folder of the original, and the original on every text."""

    work: Path
    folder: Path
    texts: list[tuple[texts.Text, evaluation.Original]]


def main() -> None:
    """Print one row of a markdown table per quantised model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything big")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--texts", nargs="*", choices=texts.TOKENS, default=["en"])
    parser.add_argument("--tokens", type=int, help="evaluate on fewer tokens of each text")
    parser.add_argument("--samples", type=int, default=72, help="calibration windows of 1024")
    parser.add_argument("--effort", default="standard")
    parser.add_argument(
        "--set", action="append", default=[], type=setting, metavar="KEY=VALUE",
        help="another option of erniequant.quantize",
    )  # fmt: skip
    parser.add_argument("--sparse", action="store_true", help="eight experts, a token uses four")
    parser.add_argument("--no-noise", action="store_true", help="keep the weights' 4-bit grid")
    parser.add_argument(
        "--evaluate", type=Path, nargs="*", metavar="FOLDER",
        help="quantise nothing; evaluate these quantised or bf16 folders",
    )  # fmt: skip
    options = parser.parse_args()
    more = dict(options.set)
    if own := more.keys() & {"src", "dst", "bits", "seed", "calib", "calib_samples", "effort"}:
        parser.error(f"--set {min(own)}: this program has its own option for it")
    if unknown := more.keys() - inspect.signature(erniequant.quantize).parameters.keys():
        parser.error(f"--set {min(unknown)}: erniequant.quantize has no such option")
    logging.disable_progress_bar()
    bench = prepare(options)
    print_heading(bench)
    if options.evaluate is not None:
        for folder in options.evaluate:
            record(bench, {"model": folder.name, "folder": str(folder)}, folder)
        return
    for bits in options.bits:
        for seed in options.seeds:
            quantised(bench, options, more, bits, seed)


def setting(text: str) -> tuple[str, Any]:
    """``key=value``; the value as Python has it, or text."""
    key, equal, value = text.partition("=")
    if not equal:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def prepare(options: argparse.Namespace) -> Bench:
    """Make the original and evaluate it, as far as that was not done before."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "calibration.txt").is_file():
        (work / "calibration.txt").write_text(erniequant_data.calibration_text("en"), "utf-8")
    folder = make(work, options.sparse, not options.no_noise)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = calibration_ids(tokenizer)
    results = []
    for name in options.texts:
        text = texts.read(name, work, tokenizer, options.tokens)
        share = texts.overlap(text.ids, known)
        print(
            f"{name}: {len(text.ids):,} tokens, sha256 of the text {text.sha256}, "
            f"{share:.2%} of its {texts.NGRAM}-grams occur in the calibration text"
        )
        if share:
            sys.exit(f"the text {name} overlaps the calibration text")
        original, seconds = timed(evaluation.original, folder, text.ids, work / "originals")
        print(
            f"{name}: perplexity of the original {original.perplexity:.3f} "
            f"on {len(original.loss):,} tokens ({seconds:.0f} s)",
            flush=True,
        )
        results.append((text, original))
    return Bench(work, folder, results)


def make(work: Path, sparse: bool, noise: bool) -> Path:
    """The folder of the original, written if it is not there."""
    folder = work / (("sparse" if sparse else "dense") + ("-noise" if noise else ""))
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        layers = None
        if sparse:
            dense = make(work, False, noise)
            ids = calibration_ids(AutoTokenizer.from_pretrained(dense))
            layers = routers.learned(evaluation.load(dense), routers.spread(ids))
        model.write(source.load(work, noise), folder, layers)
    return folder


def calibration_ids(tokenizer: Any) -> torch.Tensor:
    """Token ids of the calibration text."""
    return torch.tensor(tokenizer(erniequant_data.calibration_text("en"))["input_ids"])


def quantised(
    bench: Bench, options: argparse.Namespace, more: dict[str, Any], bits: int, seed: int
) -> None:
    """Quantise and evaluate. An unfinished run is continued, a finished one is done again."""
    extra = "".join(f"-{key}={value}" for key, value in more.items())
    name = f"{bench.folder.name}-{bits}bits-seed{seed}-{options.effort}-{options.samples}{extra}"
    packed = bench.work / "packed" / name.replace("/", "_")
    if (packed / "config.json").is_file():
        shutil.rmtree(packed)
    report, seconds = timed(
        erniequant.quantize, bench.folder, packed, bits=bits, seed=seed, effort=options.effort,
        calib=str(bench.work / "calibration.txt"), calib_samples=options.samples, **more,
    )  # fmt: skip
    entry = {
        "model": bench.folder.name, "bits": bits, "seed": seed, "effort": options.effort,
        "options": more, "folder": str(packed), "quantize_seconds": report.seconds,
        "calibration_tokens": report.calibration.tokens if report.calibration else 0,
        "wall_seconds": seconds, "layer_seconds": report.layer_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
    }  # fmt: skip
    record(bench, entry, packed)


def record(bench: Bench, entry: dict[str, Any], folder: Path) -> None:
    """Evaluate a folder on all texts, print its row and keep its figures."""
    plain = folder
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        plain = bench.work / "plain" / folder.name
        shutil.rmtree(plain, ignore_errors=True)
        _, entry["export_seconds"] = timed(erniequant.export, folder, plain, to="bf16")
    other, entry["load_seconds"] = timed(evaluation.load, plain)
    entry["original"], entry["texts"] = str(bench.folder), {}
    row = [entry["model"], entry.get("bits", ""), entry.get("seed", ""), settings_of(entry)]
    for text, original in bench.texts:
        figures, seconds = timed(evaluation.compare, other, text.ids, original)
        entry["texts"][text.name] = {
            **asdict(figures), "original_perplexity": original.perplexity,
            "sha256": text.sha256, "seconds": seconds,
        }  # fmt: skip
        row += [
            f"{figures.ratio:.4f} ± {figures.ratio_error:.4f}",
            f"{figures.kl:.4f} ± {figures.kl_error:.4f}",
            f"{figures.top:.1%}",
        ]
    took = entry.get("quantize_seconds")
    row.append("" if took is None else f"{took:.0f}")
    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    with (bench.work / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **entry}) + "\n")
    if plain != folder:
        shutil.rmtree(plain)


def settings_of(entry: dict[str, Any]) -> str:
    """``key=value`` of the options given through."""
    return ", ".join(f"{key}={value}" for key, value in entry.get("options", {}).items())


def print_heading(bench: Bench) -> None:
    """The heading of the table: ratio, KL and top-1 agreement for each text."""
    columns = ["model", "bits", "seed", "options"]
    for text, _ in bench.texts:
        columns += [f"{text.name}: ratio", "KL", "top-1"]
    print("| " + " | ".join([*columns, "seconds"]) + " |")
    print("|---" * (len(columns) + 1) + "|", flush=True)


def timed(function: Callable[..., Result], *args: Any, **named: Any) -> tuple[Result, float]:
    """The result and the seconds it took."""
    begin = time.perf_counter()
    return function(*args, **named), time.perf_counter() - begin


if __name__ == "__main__":
    main()
