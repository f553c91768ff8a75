"""Quantise the embedded tiny vision-language model with images and text-only, and fill the tables
of docs/vision_language.md.

Run from the repository root: ``python -m benchmarks.vision_language.page``; takes some minutes
on two cores. ``--model DIR --images FILE.jsonl --samples N`` measures another model, for example
VL-28B-A3B, and prints the tables only.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, silu

import erniequant
from benchmarks.pages import DOCS, ROOT, fill
from erniequant.data.inputs import ModelInput
from erniequant.evaluate import ImageTextResult, image_perplexity, perplexity
from erniequant.evaluate.images import evaluation_inputs
from erniequant.runtime.experts import PackedExperts
from erniequant_data import calibration_text, heldout_text, tiny_vl_model_dir

PAGE = DOCS / "vision_language.md"
BUILD = ROOT / "calib_data" / "build"
BITS = (4, 3, 2)
TEXT_TOKENS, CONTEXT = 16_384, 512
# Scenes that neither training nor calibration has seen, beside the shipped ones: 44 records are too
# few to tell models of equal size apart.
SCENES, FIRST_SEED = 400, 2_500_000


@dataclass(frozen=True)
class Made:
    """A quantised model, and how it was calibrated."""

    bits: int
    images: bool
    model: Any
    bits_per_weight: float
    degraded: int


def scenes(folder: Path, count: int) -> Path:
    """A JSONL file of drawn scenes with captions."""
    sys.path.insert(0, str(BUILD))
    scene = importlib.import_module("draw_images").scene

    lines = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        image, caption = scene(seed)
        image.save(folder / f"{seed}.png")
        lines.append(json.dumps({"image": f"{seed}.png", "text": caption}) + "\n")
    path = folder / "scenes.jsonl"
    path.write_text("".join(lines), "utf-8")
    return path


def make(source: Path, work: Path, bits: int, calib: str, images: bool, samples: int) -> Made:
    """Quantise with images or text-only."""
    folder = work / f"{bits}-{'images' if images else 'text'}"
    report = erniequant.quantize(
        source, folder, bits=bits, calib=calib, calib_samples=samples, calib_length=CONTEXT
    )
    model, _ = erniequant.load(folder)
    return Made(bits, images, model, report.plan.expert_bits_per_weight, report.degraded)


@torch.no_grad()
def matrix_errors(original: Any, quantized: Any, inputs: list[ModelInput]) -> dict[str, float]:
    """``tr(E H E^T) / tr(W H W^T)`` of every matrix of the vision experts, on the inputs that
    held-out images give them in the original model; experts without tokens are left out."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    handles = []
    for path, module in original.named_modules():
        if path.endswith("vision_moe.experts"):

            def keep(module: Any, given: Any, path: str = path) -> None:
                seen[path].append((given[0].float(), given[1]))

            handles.append(module.register_forward_pre_hook(keep))
    for entry in inputs:
        original(**entry.batch(), use_cache=False)
    for handle in handles:
        handle.remove()
    errors = {}
    for path, parts in seen.items():
        x, chosen = (torch.cat(tables) for tables in zip(*parts, strict=True))
        stock, packed = original.get_submodule(path), quantized.get_submodule(path)
        assert isinstance(packed, PackedExperts)
        for expert in range(packed.num_experts):
            rows = x[(chosen == expert).any(-1)]
            if not len(rows):
                continue
            gate_up, down = (
                getattr(stock, name)[expert].float() for name in ("gate_up_proj", "down_proj")
            )
            gate, up = linear(rows, gate_up).chunk(2, dim=-1)
            for name, weight, given in (
                ("gate_up_proj", gate_up, rows),
                ("down_proj", down, silu(gate) * up),
            ):
                decoded = packed.weight(name, expert, torch.float32)
                wanted = linear(given, weight)
                lost = (linear(given, decoded) - wanted).square().sum()
                errors[f"{path}.{expert}.{name}"] = float(lost / wanted.square().sum())
    return errors


def paired(first: dict[str, float], second: dict[str, float]) -> str:
    """Geometric mean of both, and the mean logarithm of their ratio over its standard error."""
    logs = [math.log(second[name] / first[name]) for name in first]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    means = [math.exp(statistics.mean(map(math.log, e.values()))) for e in (first, second)]
    lower = sum(log > 0 for log in logs)
    return (
        f"{means[0]:.5f} | {means[1]:.5f} | {lower} of {len(logs)} | "
        f"{statistics.mean(logs) / error:.1f}"
    )


def ratio(result: Any) -> str:
    return f"{result.reference.ratio:.4f} ± {result.reference.ratio_stderr:.4f}"


def tables(
    original: Any, tokenizer: Any, models: list[Made], inputs: list[ModelInput]
) -> Iterator[tuple[str, str]]:
    """Both tables by their names."""
    text = heldout_text()
    plain = perplexity(original, tokenizer, text, context=CONTEXT, tokens=TEXT_TOKENS)
    given_images = image_perplexity(original, tokenizer, inputs)
    lines = [
        "| model | calibrated on | bits/weight, experts | text perplexity | ratio to bf16 "
        "| perplexity given images | ratio to bf16 | KL given images |\n"
        "|---|---|---|---|---|---|---|---|",
        f"| bf16 | | 16.00 | {plain.perplexity:.2f} | 1 | {given_images.perplexity:.4f} | 1 | 0 |",
    ]
    results: dict[tuple[int, bool], ImageTextResult] = {}
    for made in models:
        of_text = perplexity(
            made.model, tokenizer, text, reference=original, context=CONTEXT, tokens=TEXT_TOKENS
        )
        of_images = image_perplexity(made.model, tokenizer, inputs, reference=original)
        results[made.bits, made.images] = of_images
        assert of_images.reference is not None
        lines.append(
            f"| {made.bits} bits | {'text and images' if made.images else 'text only'} "
            f"| {made.bits_per_weight:.2f} | {of_text.perplexity:.2f} | {ratio(of_text)} "
            f"| {of_images.perplexity:.4f} | {ratio(of_images)} "
            f"| {of_images.reference.kl_mean:.5f} |"
        )
    lines.append(
        f"\n{plain.tokens} held-out text tokens in windows of {CONTEXT}; {given_images.tokens} "
        f"caption tokens of {given_images.images} held-out images in {given_images.records} "
        "records; ratios paired with bf16 on the same tokens, ± one standard error clustered by "
        "window or record."
    )
    yield "perplexity", "\n".join(lines)
    yield "paired", "\n".join(_paired_lines(original, tokenizer, models, inputs))


def _paired_lines(
    original: Any, tokenizer: Any, models: list[Made], inputs: list[ModelInput]
) -> Iterator[str]:
    yield (
        "| bits | weighted error of vision experts, with images | text only | lower with "
        "images | t | perplexity given images, text only ÷ with images |\n"
        "|---|---|---|---|---|---|"
    )
    by_key = {(made.bits, made.images): made.model for made in models}
    for bits in sorted({made.bits for made in models}, reverse=True):
        with_images, on_text = by_key[bits, True], by_key[bits, False]
        errors = [matrix_errors(original, model, inputs) for model in (with_images, on_text)]
        both = image_perplexity(on_text, tokenizer, inputs, reference=with_images)
        yield f"| {bits} | {paired(*errors)} | {ratio(both)} |"


def main() -> None:
    """Measure, print, and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--images", default="builtin", help="JSONL to evaluate on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    args = parser.parse_args()
    # The operators of so small a model are over before a second thread has started.
    torch.set_num_threads(1)
    source = args.model or tiny_vl_model_dir()
    original, tokenizer = erniequant.load(source)
    with tempfile.TemporaryDirectory(prefix="erniequant-vl-") as name:
        work = Path(name)
        text_alone = work / "text.txt"
        text_alone.write_text(calibration_text(), "utf-8")
        inputs = evaluation_inputs(original, tokenizer, args.images)
        if args.model is None:
            inputs += evaluation_inputs(original, tokenizer, scenes(work, SCENES))
        models = [
            make(source, work, bits, calib, images, args.samples)
            for bits in args.bits
            for calib, images in (("builtin", True), (str(text_alone), False))
        ]
        for section, table in tables(original, tokenizer, models, inputs):
            print(f"\n{table}")
            if args.model is None:
                fill(PAGE, section, table)


if __name__ == "__main__":
    main()
