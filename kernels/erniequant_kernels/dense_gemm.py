# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Multiply tokens with bfloat16 weights of their experts: the product for many rows per expert.

The same cut into row tiles as the packed product. With decoded labels for weights it is the second
half of "decode once, then multiply"; with a model's own weights it is the baseline of the
benchmark.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from erniequant_kernels.bfloat16 import MATRIX_TYPE, rounded
from erniequant_kernels.launch import launch
from erniequant_kernels.routing import RowTiles, tile_assignments


@dataclass(frozen=True)
class DenseGemmConfig:
    """Tile sizes (powers of two), warps and pipeline stages; ``programs`` share the tiles."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int


def dense_gemm_reference(
    x: torch.Tensor, weights: torch.Tensor, expert_index: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The product in plain torch, float32 ``[A, N]``; arguments as in `dense_gemm`."""
    out = torch.zeros(expert_index.numel(), weights.shape[1], device=x.device)
    for expert in range(weights.shape[0]):
        mine = torch.where(expert_index == expert)[0]
        out[mine] = x[mine // top_k].float() @ weights[expert].float().T
    return out


@triton.jit
def dense_gemm_kernel(
    x_ptr,
    weights_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    tile_end_ptr,
    starts_ptr,
    out_ptr,
    first_expert,
    end_expert,
    TOP_K: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Programs take turns over the tiles of experts ``first_expert .. end_expert - 1``."""
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    index = tl.load(starts_ptr + first_expert) * BLOCKS + tl.program_id(0)
    end = tl.load(starts_ptr + end_expert) * BLOCKS
    while index < end:
        row_tile = index // BLOCKS
        expert = tl.load(tile_expert_ptr + row_tile) - first_expert
        assignment, inside = tile_assignments(
            order_ptr, tile_first_ptr, tile_end_ptr, row_tile, BLOCK_M
        )
        output = index % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
        safe_output = tl.minimum(output, OUTPUTS - 1).to(tl.int64)
        x_ptrs = x_ptr + (assignment // TOP_K * INPUTS)[:, None]
        w_ptrs = weights_ptr + (expert.to(tl.int64) * OUTPUTS + safe_output)[None, :] * INPUTS
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for turn in range(0, (INPUTS + BLOCK_K - 1) // BLOCK_K):
            k = turn * BLOCK_K + tl.arange(0, BLOCK_K)
            if INPUTS % BLOCK_K == 0:
                x = tl.load(x_ptrs + k[None, :])
                w = tl.load(w_ptrs + k[:, None])
            else:
                x = tl.load(x_ptrs + k[None, :], mask=(k < INPUTS)[None, :], other=0)
                w = tl.load(w_ptrs + k[:, None], mask=(k < INPUTS)[:, None], other=0)
            total = tl.dot(x.to(MATRIX_TYPE), w.to(MATRIX_TYPE), total)
        place = out_ptr + assignment[:, None] * OUTPUTS + output[None, :]
        mask = inside[:, None] & (output < OUTPUTS)[None, :]
        tl.store(place, rounded(total, out_ptr.dtype.element_ty), mask=mask)
        index += tl.num_programs(0)


def dense_gemm(
    x: torch.Tensor, weights: torch.Tensor, tiles: RowTiles, top_k: int, out: torch.Tensor,
    config: DenseGemmConfig, first_expert: int = 0,
) -> None:  # fmt: skip
    """Products of the assignments to some experts.

    Args:
        x: bfloat16 ``[rows, K]``, contiguous; assignment ``a`` reads row ``a // top_k``.
        weights: bfloat16 ``[experts, N, K]``, contiguous: expert ``first_expert`` and following.
        tiles: row tiles of ``config.block_m`` over all experts.
        out: ``[A, N]`` of any float type, contiguous; other experts' rows are left as they are.
    """
    experts, outputs, inputs = weights.shape
    launch(
        dense_gemm_kernel, (config.programs,),
        x, weights, tiles.order, tiles.expert, tiles.first, tiles.end, tiles.starts, out,
        first_expert, first_expert + experts,
        TOP_K=top_k, INPUTS=inputs, OUTPUTS=outputs, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
