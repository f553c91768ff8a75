"""Time one expert and one layer's forward at the shapes of a large model, split by phase.

    taskset -c 0 python -m benchmarks.quantize.expert [--bits 2 4] [--tokens 12288]

The rate of the bare encoder is measured before and after in the same run. Times are those of the
thread's processor, so other programs on the machine matter little; one core does everything.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.large_models.checkpoint import SHAPES
from benchmarks.quantize.sampling import sampled
from erniequant.calibration.rows import RowPool
from erniequant.codes.registry import get_code
from erniequant.codes.viterbi import encoder
from erniequant.encoding.matrix import Rotation, TrellisQuantizer
from erniequant.models.architecture import EXPERT_MATRICES, ExpertGroup, MoeInput
from erniequant.packing.rotation import block_size, random_signs
from erniequant.packing.schema import MatrixSpec
from erniequant.quantization.expert_job import ExpertJob, ExpertLayer, Routed, run_job
from erniequant.quantization.layer import LayerInput, layer_context

PHASES = {
    "encode_rows": "search",
    "_encode_tiles": "feedback",
    "encode_matrix": "feedback",
    "add_moments": "moments",
    "add": "moments",
    "corrected_target": "target",
    "_gate_up_target": "target",
    "_gate_up_metric": "metric of outputs",
    "output_factor": "metric of outputs",
    "factorise": "factorisation",
    "rotate_moments": "rotation",
    "reorder_moments": "rotation",
    "rotate": "rotation",
    "unrotate": "rotation",
    "refit_scale": "refit",
    "refit_scales_together": "refit",
    "_quantized_contribution": "forward",
    "_original_contribution": "forward",
    "_gate_up_moments": "forward",
    "_down_target": "forward",
    "evidence": "read",
    "tensor": "read",
}
"""Phases by function; products with tokens that are not moments are forward passes."""

CODES = {2: ("cc2", 12), 3: ("cc3", 13), 4: ("cc4", 13)}
"""Code and register length of ``--effort standard``."""

TILE = 256


class Source:
    """An expert's matrices in bfloat16, as a checkpoint has them."""

    def __init__(self, hidden: int, inner: int) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
        shapes["down_proj"] = (hidden, inner)
        self._tensors = {
            name: (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
            for name, shape in shapes.items()
        }

    def names(self) -> list[str]:
        """Names of the matrices."""
        return list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """A matrix by its name."""
        return self._tensors[name]


def main() -> None:
    """Print a table for each width."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="21b")
    parser.add_argument("--bits", type=int, nargs="+", choices=CODES, default=[2, 4])
    parser.add_argument("--tokens", type=int, default=12_288, help="tokens of the expert")
    parser.add_argument("--json", type=Path, help="append the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for bits in options.bits:
        figures = measure(options.shape, bits, options.tokens)
        print(table(figures), flush=True)
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")


def measure(shape: str, bits: int, tokens: int) -> dict[str, Any]:
    """Seconds by phase of one expert with ``tokens`` tokens, and of the bare encoder on its
    weights, before and after."""
    hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["moe_intermediate_size"]
    layer, job = _job(hidden, inner, bits, tokens)
    run_job(*_job(128, 64, bits, 64)[::-1])  # compiled here
    weights = 3 * hidden * inner
    before = bare_rate(bits)
    seconds = sampled(lambda: run_job(job, layer), PHASES, "other")
    after = bare_rate(bits)
    bare = weights / ((before + after) / 2)
    total = sum(seconds.values())
    return {
        "shape": shape, "bits": bits, "tokens": tokens, "weights": weights, "seconds": total,
        "phases": seconds, "bare_rates": [before, after], "share": bare / total,
    }  # fmt: skip


def _job(hidden: int, inner: int, bits: int, tokens: int) -> tuple[ExpertLayer, ExpertJob]:
    """A layer in which one expert is given all tokens, and the job of that expert."""
    generator = torch.Generator().manual_seed(2)
    name, register = CODES[bits]
    quantizers = []
    for width, outputs in ((hidden, 2 * inner), (inner, hidden)):
        block = block_size(width)
        spec = MatrixSpec(name, register, block, min(TILE, outputs & -outputs))
        quantizers.append(TrellisQuantizer(spec, Rotation(random_signs(width, generator), block)))
    channels = torch.rand(hidden, generator=generator) + 0.5
    original = torch.randn(tokens, hidden, generator=generator) * channels
    given = original + 0.1 * torch.randn(tokens, hidden, generator=generator)
    chosen = torch.zeros(tokens, 1, dtype=torch.int64)
    weight = torch.rand(tokens, 1, generator=generator)
    everywhere = torch.ones(tokens, dtype=torch.bool)
    inputs = LayerInput(
        MoeInput(given, chosen, weight), MoeInput(original, chosen, weight),
        original - given, everywhere, everywhere,
    )  # fmt: skip
    group = ExpertGroup("", 1, inner)
    gate_up, down = quantizers
    context = layer_context(inputs, group, gate_up, down, torch.device("cpu"))
    layer = ExpertLayer(Source(hidden, inner), inputs, context, RowPool(None))
    routed = Routed(torch.arange(tokens), weight[:, 0])
    return layer, ExpertJob(0, {m: m for m in EXPERT_MATRICES}, routed, routed)


def bare_rate(bits: int, seconds: float = 3.0) -> float:
    """Weights a second of the search alone, on one core."""
    search = encoder(get_code(*CODES[bits]))
    targets = np.random.default_rng(0).standard_normal((16, TILE), np.float32)
    weights = np.ones_like(targets)
    search.encode(targets[:1], weights[:1])
    done, start = 0, time.thread_time()
    while time.thread_time() - start < seconds:
        search.encode(targets, weights)
        done += targets.size
    return done / (time.thread_time() - start)


def table(figures: dict[str, Any]) -> str:
    """The phases as rows of a markdown table."""
    total = figures["seconds"]
    return "\n".join([*_heading(figures), *_rows(figures["phases"], total)])


def _heading(figures: dict[str, Any]) -> Iterator[str]:
    rates = " and ".join(f"{rate / 1e6:.2f}" for rate in figures["bare_rates"])
    yield (
        f"{figures['shape']}, {figures['bits']} bits, {figures['tokens']:,} tokens: "
        f"{figures['seconds']:.1f} s, {figures['share']:.0%} of the bare encoder's rate "
        f"({rates} M weights a second before and after)\n"
    )
    yield "| phase | s | share |\n|---|---|---|"


def _rows(phases: dict[str, float], total: float) -> Iterator[str]:
    for phase, seconds in phases.items():
        yield f"| {phase} | {seconds:.2f} | {seconds / total:.0%} |"


if __name__ == "__main__":
    main()
