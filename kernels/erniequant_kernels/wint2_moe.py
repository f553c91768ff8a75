"""The experts of a layer in Baidu's WINT2 format, on packed weights.

WINT2 has no rotation: signs are positive and rotation blocks have one channel. Super scales are
bfloat16 numbers, one an output, which is what the kernels between and after the products take for
scales.
"""

from functools import cache

import torch

from erniequant_kernels.combine import combine
from erniequant_kernels.matrices import Wint2Matrices
from erniequant_kernels.prepare import prepare
from erniequant_kernels.rotation import swiglu_rotate
from erniequant_kernels.routing import RowTiles
from erniequant_kernels.wint2_decode import refuse_capture, wint2_constants
from erniequant_kernels.wint2_gemm import wint2_gemm
from erniequant_kernels.wint2_tuning import Wint2Row, Wint2Tuning


def prepare_constants(*matrices: Wint2Matrices) -> None:
    """Build what `moe_experts_wint2` needs beside its arguments, on the device of the matrices: a
    few bytes, to be there before a CUDA graph is captured.

    Raises:
        ErnieQuantError: one is being captured.
    """
    for matrix in matrices:
        device = matrix.quant_weight.device
        wint2_constants(device)
        _positive(matrix.inputs, device)


def moe_experts_wint2(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, gate_up: Wint2Matrices,
    down: Wint2Matrices, tuning: Wint2Tuning,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of ``down(silu(gate(x)) * up(x))`` over the chosen experts of each token.

    Activations are bfloat16, sums float32, results of the projections float32 for few tokens and
    bfloat16 for many. All memory beside the result is for activations.

    Args:
        x: ``[T, H]`` of any float type, contiguous.
        expert_index: integer ``[T, k]``; an index outside ``[0, E)`` contributes nothing.
        routing: float ``[T, k]``.

    Returns:
        ``[T, H]`` in the dtype of ``x``. The same bits for the same arguments, whatever the order
        in which programs run.

    Raises:
        ErnieQuantError: a CUDA graph is captured and `prepare_constants` was not called before.
    """
    out = torch.empty_like(x)
    tokens, top_k = expert_index.shape
    if tokens == 0 or top_k == 0:
        return out.zero_()
    expert_index, routing = expert_index.contiguous(), routing.contiguous()
    row = tuning.row(tokens * top_k / gate_up.experts)
    hidden = _rows(x, tokens, gate_up.inputs)
    tiles = prepare(
        expert_index, gate_up.experts, row.block_m, x, _positive(gate_up.inputs, x.device), 1,
        Form.PLAIN, hidden,
    )  # fmt: skip
    partial = _multiply(hidden, gate_up, tiles, top_k, row, tuning)
    inner = _rows(x, tokens * top_k, down.inputs)
    swiglu_rotate(
        partial, _scales(gate_up), expert_index, _positive(down.inputs, x.device), 1, Form.PLAIN,
        inner,
    )  # fmt: skip
    partial = _multiply(inner, down, tiles, 1, row, tuning)
    combine(partial, _scales(down), expert_index, routing, out)
    return out


def _multiply(
    x: torch.Tensor, matrix: Wint2Matrices, tiles: RowTiles, top_k: int, row: Wint2Row,
    tuning: Wint2Tuning,
) -> torch.Tensor:  # fmt: skip
    """Products of all assignments before super scales: ``[splits, A, N]``."""
    assignments = tiles.order.numel()
    config = tuning.config(row, matrix, assignments)
    shape = (config.splits, assignments, matrix.outputs)
    out = torch.empty(shape, dtype=row.partial_dtype, device=x.device)
    wint2_gemm(x, matrix, tiles, top_k, out, config)
    return out


def _scales(matrix: Wint2Matrices) -> torch.Tensor:
    """Super scales as bfloat16 patterns: int16 ``[E, N]``."""
    return matrix.super_scales.view(torch.int16)


def _rows(x: torch.Tensor, rows: int, inputs: int) -> torch.Tensor:
    return torch.empty(rows, inputs, dtype=torch.bfloat16, device=x.device)


@cache
def _positive(inputs: int, device: torch.device) -> torch.Tensor:
    refuse_capture(device)
    return torch.zeros(-(-inputs // 32), dtype=torch.int32, device=device)
