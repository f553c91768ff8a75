"""Quantise all experts of one layer.

Experts are independent given the layer's inputs, so they run on several threads; every product
runs on one thread, which makes results independent of the number of threads.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from erniequant.calibration.hessian import cross_moments, second_moments
from erniequant.models.ernie45_text import MoeInput
from erniequant.quantization.expert import (
    Evidence,
    ExpertWeights,
    LayerContext,
    ProjectionCodes,
    QuantizedExpert,
    quantize_expert,
)
from erniequant.quantization.matrix import Rotation

SAMPLE_TOKENS = 2048
"""Tokens of the layer that stand in for an expert's own where it has few."""


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What a layer's experts are given for the calibration text.

    Attributes:
        quantized: in the quantised model.
        original: in the original model, whose router may choose other experts.
        drift: original minus quantised hidden states that the outputs are added to, float32
            ``[T, H]``.
    """

    quantized: MoeInput
    original: MoeInput
    drift: torch.Tensor

    def evidence(self, rows: torch.Tensor, weights: torch.Tensor) -> Evidence:
        """Tokens by row, with their weights."""
        return Evidence(self.quantized.x[rows], self.original.x[rows], self.drift[rows], weights)


@dataclass(frozen=True, eq=False)
class Contribution:
    """What an expert adds to hidden states: rows int64 ``[n]`` and values float32 ``[n, H]``."""

    rows: torch.Tensor
    values: torch.Tensor

    def add_to(self, states: torch.Tensor) -> None:
        """Add it to hidden states ``[T, H]`` in place."""
        if self.rows.numel():
            states.index_add_(0, self.rows, self.values)


@dataclass(frozen=True, eq=False)
class ExpertOutcome:
    """A quantised expert, the number of tokens routed to it, and what it and its original add to
    the hidden states of either model."""

    expert: int
    result: QuantizedExpert
    tokens: int
    quantized: Contribution
    original: Contribution


def layer_context(
    inputs: LayerInput, codes: ProjectionCodes, input_rotation: Rotation, inner_rotation: Rotation
) -> LayerContext:
    """Pool the layer's routed tokens: shared prior moments and an evenly spaced sample."""
    counts = inputs.quantized.weight.float().square().sum(-1)
    stride = max(counts.numel() // SAMPLE_TOKENS, 1)
    rows = torch.arange(0, counts.numel(), stride)
    sample = inputs.evidence(rows, counts[rows]).finite()
    # Not by rows, which would copy gigabytes.
    everything = Evidence(inputs.quantized.x, inputs.original.x, inputs.drift, counts).finite()
    pooled = second_moments(everything.x, everything.weights)
    missing = cross_moments(
        everything.x, everything.original - everything.x, everything.weights
    ) / max(pooled.weight, 1e-30)
    return LayerContext(codes, input_rotation, inner_rotation, pooled.mean(), missing, sample)


def quantize_experts(
    inputs: LayerInput,
    context: LayerContext,
    experts: int,
    load: Callable[[int], ExpertWeights],
    threads: int,
) -> Iterator[ExpertOutcome]:
    """Quantise experts ``0..experts-1`` in order, ``threads`` at a time."""

    def one(expert: int) -> ExpertOutcome:
        torch.set_num_threads(1)
        rows, weight = inputs.quantized.routed_to(expert)
        weights = load(expert)
        result = quantize_expert(weights, inputs.evidence(rows, weight.square()), context)
        return ExpertOutcome(
            expert,
            result,
            rows.numel(),
            Contribution(rows, result.output * weight[:, None]),
            _original_contribution(inputs.original, expert, weights, rows, result.original),
        )

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, experts, threads):
            yield from pool.map(one, range(start, min(start + threads, experts)))


def _original_contribution(
    inputs: MoeInput, expert: int, weights: ExpertWeights, known: torch.Tensor, values: torch.Tensor
) -> Contribution:
    """What the source expert adds in the original model.

    Both models send most tokens to the same experts; their ``values`` for the rows ``known`` are
    there already, only the others are computed.
    """
    rows, weight = inputs.routed_to(expert)
    shared = torch.isin(rows, known)
    output = torch.empty(rows.numel(), values.shape[-1])
    output[shared] = values[torch.isin(known, rows)]
    output[~shared] = weights.forward(inputs.x[rows[~shared]])
    return Contribution(rows, output * weight[:, None])
