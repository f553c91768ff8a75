"""Predicted time of a layer of experts on a card, from counted machine code and specified figures.

docs/performance.md lists the assumptions. No GPU is needed, and none has confirmed it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from erniequant.codes import register_length
from erniequant_kernels.bench.problem import Shape, make_batch
from erniequant_kernels.tuning import Tuning, tables

STANDARD = {bits: f"cc{bits} L{register_length(bits, 'standard')}" for bits in (2, 3, 4)}
REACHED = 0.9  # share of the specified memory bandwidth that a large copy reaches
GEMM_REACHED = 0.7  # share of the matrix units' peak that a large product reaches
LAUNCH = 2e-6  # seconds between kernels of a CUDA graph
LAUNCHES = 5  # of a layer, packed or in bf16


@dataclass(frozen=True)
class Card:
    """The specified figures of a card.

    Attributes:
        arch: architecture whose machine code and tuning table are used; Ada runs the code of sm_80.
        gigabytes: memory bandwidth in GB/s, as specified.
        mma, peak: bf16 multiply-adds with float32 sums per clock and multiprocessor, by the
            warp-wide matrix instruction and by the fastest one.
    """

    name: str
    arch: int
    multiprocessors: int
    gigahertz: float
    gigabytes: float
    mma: float
    peak: float

    @property
    def clocks(self) -> float:
        """Multiprocessor clocks per second, all together."""
        return self.multiprocessors * self.gigahertz * 1e9

    @property
    def bytes_per_second(self) -> float:
        """Memory bandwidth that a kernel can reach."""
        return REACHED * self.gigabytes * 1e9


# Specified figures; Hopper's warp-wide instruction reaches about five eighths of the peak of the
# warp-group-wide one in published micro-benchmarks.
CARDS = (
    Card("RTX 4090", 80, 128, 2.52, 1008, 256, 256),
    Card("A100 80 GB", 80, 108, 1.41, 2039, 1024, 1024),
    Card("H100 SXM", 90, 132, 1.755, 3350, 1280, 2048),
    Card("H200", 90, 132, 1.755, 4800, 1280, 2048),
)


def loads(shape: Shape, tokens: int) -> torch.Tensor:
    """Assignments per expert of the benchmark's batch."""
    index = make_batch(
        Shape(1, 1, shape.experts, shape.top_k), tokens, torch.device("cpu")
    ).expert_index
    return torch.bincount(index.flatten(), minlength=shape.experts)


def packed_seconds(
    card: Card, shape: Shape, tokens: int, bits: int, costs: Mapping[str, float], tuning: Tuning
) -> tuple[float, str]:
    """Predicted time of a layer on packed weights, and what bounds it."""
    counts = loads(shape, tokens)
    row = tuning.packed_row(tokens * shape.top_k / shape.experts, {bits})
    weights = shape.weights_per_expert
    if row is None:
        return _decode_once_seconds(card, shape, tokens, bits, costs)
    tiles = int((-(-counts // row.block_m)).sum())
    cost = costs[f"packed_gemm {STANDARD[bits]} M{row.block_m}"]
    parts = {
        "memory": int((counts > 0).sum()) * weights * bits / 8 / card.bytes_per_second,
        "issue": tiles * weights * cost / (card.clocks * 4 * 32),
        "matrix": tiles * weights * 2 * row.block_m / (card.clocks * card.mma),
    }
    bound = max(parts, key=lambda name: parts[name])
    return parts[bound] + LAUNCHES * LAUNCH, bound


def _decode_once_seconds(
    card: Card, shape: Shape, tokens: int, bits: int, costs: Mapping[str, float]
) -> tuple[float, str]:
    weights = shape.experts * shape.weights_per_expert
    decode = weights * costs[f"expand {STANDARD[bits]}"] / (card.clocks * 4 * 32)
    traffic = 2 * 2 * weights / card.bytes_per_second  # decoded weights, written and read once
    # The next experts are decoded while the last are multiplied.
    parts = {"decode once": max(decode, traffic), "product": _gemm_seconds(card, shape, tokens)}
    bound = max(parts, key=lambda name: parts[name])
    return parts[bound] + chunks(card, shape) * LAUNCH, bound


def chunks(card: Card, shape: Shape) -> int:
    """Number of times that a few experts are decoded and multiplied, over both projections."""
    tuning = tables()[f"sm_{card.arch}"]
    matrices = ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
    return sum(-(-shape.experts // tuning.experts_at_once(*matrix)) for matrix in matrices)


def _gemm_seconds(card: Card, shape: Shape, tokens: int) -> float:
    work = tokens * shape.top_k * shape.weights_per_expert
    return work / (card.clocks * card.peak * GEMM_REACHED)


def bf16_seconds(card: Card, shape: Shape, tokens: int) -> float:
    """Predicted time of a layer in bfloat16: memory or matrix units, whichever takes longer."""
    active = int((loads(shape, tokens) > 0).sum())
    memory = active * shape.weights_per_expert * 2 / card.bytes_per_second
    return max(memory, _gemm_seconds(card, shape, tokens)) + LAUNCHES * LAUNCH
