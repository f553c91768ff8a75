"""The experts of a layer in Baidu's WINT2 format: decoded a few at a time, and multiplied by the
same kernels as native experts that are decoded once (`moe`).

WINT2 has no rotation and carries its scales in the weights, so signs are positive, rotation blocks
have one channel, and scales are one.
"""

from functools import cache

import torch

from erniequant_kernels.combine import combine
from erniequant_kernels.dense_gemm import dense_gemm
from erniequant_kernels.matrices import Wint2Matrices
from erniequant_kernels.prepare import prepare
from erniequant_kernels.rotation import swiglu_rotate
from erniequant_kernels.routing import RowTiles
from erniequant_kernels.tuning import Tuning
from erniequant_kernels.wint2 import expand_wint2

_ONE = 0x3F80
"""1.0 as a bfloat16 pattern."""


def moe_experts_wint2(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, gate_up: Wint2Matrices,
    down: Wint2Matrices, tuning: Tuning,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of ``down(silu(gate(x)) * up(x))`` over the chosen experts of each token.

    Weights and activations are bfloat16, sums float32, results of the projections bfloat16.

    Args:
        x: ``[T, H]`` of any float type, contiguous.
        expert_index: integer ``[T, k]``; an index outside ``[0, E)`` contributes nothing.
        routing: float ``[T, k]``.

    Returns:
        ``[T, H]`` in the dtype of ``x``.
    """
    out = torch.empty_like(x)
    tokens, top_k = expert_index.shape
    if tokens == 0 or top_k == 0:
        return out.zero_()
    expert_index, routing = expert_index.contiguous(), routing.contiguous()
    hidden = _rows(x, tokens, gate_up.inputs)
    tiles = prepare(
        expert_index, gate_up.experts, tuning.dense.block_m, x, _positive(gate_up.inputs, x.device),
        1, hidden,
    )  # fmt: skip
    partial = _multiply(hidden, gate_up, tiles, top_k, tuning)
    inner = _rows(x, tokens * top_k, down.inputs)
    swiglu_rotate(
        partial, _ones(gate_up, x.device), expert_index, _positive(down.inputs, x.device), 1,
        inner,
    )  # fmt: skip
    partial = _multiply(inner, down, tiles, 1, tuning)
    combine(partial, _ones(down, x.device), expert_index, routing, out)
    return out


def _multiply(
    x: torch.Tensor, matrix: Wint2Matrices, tiles: RowTiles, top_k: int, tuning: Tuning
) -> torch.Tensor:
    """Products of all assignments: bfloat16 ``[1, A, N]``."""
    assignments = tiles.order.numel()
    out = torch.empty(1, assignments, matrix.outputs, dtype=torch.bfloat16, device=x.device)
    at_once = min(matrix.experts, tuning.experts_at_once(matrix.outputs, matrix.inputs))
    weights = torch.empty(
        at_once, matrix.outputs, matrix.inputs, dtype=torch.bfloat16, device=x.device
    )
    for first in range(0, matrix.experts, at_once):
        some = slice(first, min(first + at_once, matrix.experts))
        decoded = weights[: some.stop - first]
        expand_wint2(
            matrix.quant_weight[some], matrix.weight_scale[some], matrix.super_scales[some],
            matrix.code_scale[some], matrix.code_zp[some], decoded, k_order=matrix.k_order,
        )  # fmt: skip
        dense_gemm(x, decoded, tiles, top_k, out[0], tuning.dense, first_expert=first)
    return out


def _rows(x: torch.Tensor, rows: int, inputs: int) -> torch.Tensor:
    return torch.empty(rows, inputs, dtype=torch.bfloat16, device=x.device)


@cache
def _positive(inputs: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(-(-inputs // 32), dtype=torch.int32, device=device)


def _ones(matrix: Wint2Matrices, device: torch.device) -> torch.Tensor:
    return _scales_of_one(matrix.experts, matrix.outputs, device)


@cache
def _scales_of_one(experts: int, outputs: int, device: torch.device) -> torch.Tensor:
    return torch.full((experts, outputs, 1), _ONE, dtype=torch.int16, device=device)
