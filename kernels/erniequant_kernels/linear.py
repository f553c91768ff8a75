"""The product with one packed matrix: which kernels run, in which order, in which memory.

As for a layer with one expert, every launch has a shape that follows from the sizes of its
arguments, and nothing waits for the device.
"""

import torch
import triton

from erniequant_kernels.combine import combine
from erniequant_kernels.fused_gemm import FusedGemmConfig
from erniequant_kernels.launch import empty, kept_on_device, repeated
from erniequant_kernels.matrices import PackedMatrices
from erniequant_kernels.moe import multiply
from erniequant_kernels.prepare import prepare
from erniequant_kernels.tuning import Tuning

TOKENS_KEPT = 8192
"""Tokens whose routing to the only expert is kept on a device, 48 KB: more than a graph has."""


def packed_linear(x: torch.Tensor, matrix: PackedMatrices, tuning: Tuning) -> torch.Tensor:
    """``x @ W.T`` on packed weights. Rotated inputs are bfloat16, sums float32.

    Args:
        x: ``[T, K]`` of any float type, contiguous.
        matrix: of one expert.

    Returns:
        ``[T, N]`` in the dtype of ``x``. The same bits for the same arguments.

    Raises:
        ErnieQuantError: K is not a multiple of 16; a CUDA graph is being captured, and a kernel is
            not compiled, no product ran on the device before, or none with so many tokens where
            they are more than `TOKENS_KEPT`.
    """
    tokens = len(x)
    out = torch.empty(tokens, matrix.outputs, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out

    def compute() -> None:
        row = tuning.row(tokens)
        config = tuning.config(row, matrix.code, matrix.outputs, matrix.inputs, 1, 1)
        expert_index, routing = _routing(tokens, x.device)
        hidden = empty((tokens, matrix.inputs), torch.bfloat16, x.device)
        tiles = prepare(
            expert_index, 1, config.block_m, x, matrix.signs, matrix.rotation_block, hidden
        )
        if isinstance(config, FusedGemmConfig):
            multiply(hidden, matrix, config, tiles, 1, out[None], last=True)
            return
        partial = empty((config.splits, tokens, matrix.outputs), torch.float32, x.device)
        multiply(hidden, matrix, config, tiles, 1, partial)
        combine(partial, matrix.scale, expert_index, routing, out)

    repeated(("linear", x.shape, matrix.sizes, tuning), [x, *matrix.tensors, out], compute)
    return out


def _routing(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token to expert 0 with weight 1: int32 and bfloat16 ``[T, 1]``, kept on the device, as
    filling them takes as long as the launches of a token."""
    kept = max(TOKENS_KEPT, triton.next_power_of_2(tokens))
    return _zeros(kept, device)[:tokens], _ones(kept, device)[:tokens]


@kept_on_device
def _zeros(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(tokens, 1, dtype=torch.int32, device=device)


@kept_on_device
def _ones(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.ones(tokens, 1, dtype=torch.bfloat16, device=device)
