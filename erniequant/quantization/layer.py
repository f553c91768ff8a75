"""Quantise all experts of one layer and advance the hidden states through the result.

Experts are independent given the layer's inputs, so they run on several threads; every product
runs on one thread, which makes results independent of the number of threads.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from erniequant.calibration.hessian import second_moments
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
class ExpertOutcome:
    """A quantised expert, the number of tokens routed to it, and what it adds to their hidden
    states.

    ``positions`` int64 ``[n]`` are rows of the layer's hidden states, ``output`` float32 ``[n,
    H]``.
    """

    expert: int
    result: QuantizedExpert
    tokens: int
    positions: torch.Tensor
    output: torch.Tensor


def layer_context(
    inputs: MoeInput, codes: ProjectionCodes, input_rotation: Rotation, inner_rotation: Rotation
) -> LayerContext:
    """Pool the layer's routed tokens: shared prior moments and an evenly spaced sample."""
    counts = inputs.weight.float().square().sum(-1)
    pooled = second_moments(inputs.x, counts)
    stride = max(inputs.x.shape[0] // SAMPLE_TOKENS, 1)
    sample = Evidence(inputs.x[::stride].contiguous(), counts[::stride].contiguous()).finite()
    return LayerContext(codes, input_rotation, inner_rotation, pooled.mean(), sample)


def quantize_experts(
    inputs: MoeInput,
    context: LayerContext,
    experts: int,
    load: Callable[[int], ExpertWeights],
    threads: int,
) -> Iterator[ExpertOutcome]:
    """Quantise experts ``0..experts-1`` in order, ``threads`` at a time."""

    def one(expert: int) -> ExpertOutcome:
        torch.set_num_threads(1)
        positions, slot = torch.where(inputs.expert == expert)
        x = inputs.x[positions]
        weight = inputs.weight[positions, slot].float()
        result = quantize_expert(load(expert), Evidence(x, weight.square()), context)
        output = result.output * weight[:, None]
        return ExpertOutcome(expert, result, positions.numel(), positions, output)

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, experts, threads):
            yield from pool.map(one, range(start, min(start + threads, experts)))
