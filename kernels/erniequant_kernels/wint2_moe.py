"""The experts of a layer in Baidu's WINT2 format, on packed weights.

WINT2 has no rotation: signs are positive and rotation blocks have one channel. Super scales are
bfloat16 numbers, one an output, which is what the kernels between and after the products take for
scales.
"""

import torch

from erniequant_kernels.combine import combine
from erniequant_kernels.launch import empty, kept_on_device, repeated
from erniequant_kernels.matrices import Wint2Matrices
from erniequant_kernels.prepare import prepare
from erniequant_kernels.rotation import swiglu_rotate
from erniequant_kernels.routing import RowTiles
from erniequant_kernels.wint2_decode import wint2_constants
from erniequant_kernels.wint2_gemm import wint2_gemm
from erniequant_kernels.wint2_tuning import Wint2Row, Wint2Tuning


def prepare_constants(*matrices: Wint2Matrices) -> None:
    """Build what `moe_experts_wint2` needs beside its arguments, on the device of the matrices: a
    few bytes, to be there before a CUDA graph is captured.

    Raises:
        ErnieQuantError: one is being captured, and they are not there.
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
        ErnieQuantError: a CUDA graph is being captured, and a kernel is not compiled or
            `prepare_constants` was not called before.
    """
    out = torch.empty_like(x)
    tokens, top_k = expert_index.shape
    if tokens == 0 or top_k == 0:
        return out.zero_()
    expert_index, routing = expert_index.contiguous(), routing.contiguous()
    row = tuning.row(tokens * top_k / gate_up.experts)

    def compute() -> None:
        hidden = empty((tokens, gate_up.inputs), torch.bfloat16, x.device)
        tiles = prepare(
            expert_index, gate_up.experts, row.block_m, x, _positive(gate_up.inputs, x.device), 1,
            hidden,
        )  # fmt: skip
        partial = _multiply(hidden, gate_up, tiles, top_k, row, tuning)
        inner = empty((tokens * top_k, down.inputs), torch.bfloat16, x.device)
        positive = _positive(down.inputs, x.device)
        swiglu_rotate(partial, _scales(gate_up), expert_index, positive, 1, inner)
        partial = _multiply(inner, down, tiles, 1, row, tuning)
        combine(partial, _scales(down), expert_index, routing, out)

    repeated(
        ("wint2", expert_index.shape, x.shape, gate_up.sizes, down.sizes, tuning),
        [x, expert_index, routing, *gate_up.parts, *down.parts, out],
        compute,
    )
    return out


def _multiply(
    x: torch.Tensor, matrix: Wint2Matrices, tiles: RowTiles, top_k: int, row: Wint2Row,
    tuning: Wint2Tuning,
) -> torch.Tensor:  # fmt: skip
    """Products of all assignments before super scales: ``[splits, A, N]``."""
    assignments = tiles.order.numel()
    config = tuning.config(row, matrix, assignments)
    shape = (config.splits, assignments, matrix.outputs)
    out = empty(shape, row.partial_dtype, x.device)
    wint2_gemm(x, matrix, tiles, top_k, out, config)
    return out


def _scales(matrix: Wint2Matrices) -> torch.Tensor:
    """Super scales as bfloat16 patterns: int16 ``[E, N]``."""
    return matrix.super_scales.view(torch.int16)


@kept_on_device
def _positive(inputs: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(-(-inputs // 32), dtype=torch.int32, device=device)
