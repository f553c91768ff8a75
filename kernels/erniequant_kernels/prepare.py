# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Row tiles and rotated inputs in one launch: neither needs the other, and a launch is not free."""

import torch
import triton
import triton.language as tl

from erniequant_kernels.dependent import start_next_and_wait
from erniequant_kernels.launch import launch
from erniequant_kernels.rotation import rotate_kernel, rotation_constants, rotation_programs
from erniequant_kernels.routing import (
    RowTiles,
    empty_row_tiles,
    row_tiles_constants,
    row_tiles_kernel,
)


@triton.jit(do_not_specialize=["assignments", "tiles", "blocks"])
def prepare_kernel(
    index_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    starts_ptr,
    assignments,
    tiles,
    x_ptr,
    signs_ptr,
    out_ptr,
    blocks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCAN: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The first EXPERTS programs are those of `row_tiles_kernel`, the others of `rotate_kernel`."""
    start_next_and_wait(DEPENDENT)
    if tl.program_id(0) < EXPERTS:
        row_tiles_kernel(
            index_ptr, order_ptr, expert_ptr, first_ptr, end_ptr, starts_ptr, assignments, tiles,
            EXPERTS, BINS, BLOCK_M, SCAN,
        )  # fmt: skip
    else:
        rotate_kernel(x_ptr, signs_ptr, out_ptr, blocks, INPUTS, BLOCK, ROOT, NORM, ROWS, EXPERTS)


def prepare(
    expert_index: torch.Tensor, experts: int, block_m: int, x: torch.Tensor, signs: torch.Tensor,
    block: int, out: torch.Tensor,
) -> RowTiles:  # fmt: skip
    """Row tiles of a batch (see `routing.row_tiles`), and its rotated inputs.

    Args:
        x: ``[T, K]`` of any float type, contiguous.
        signs: int32 ``[ceil(K / 32)]``.
        block: rotation block, a power of two that divides K, at most 128.
        out: bfloat16 ``[T, K]``, contiguous; receives the rotated inputs.
    """
    tiles = empty_row_tiles(expert_index, experts, block_m)
    blocks = x.numel() // block
    launch(
        prepare_kernel, (experts + rotation_programs(blocks, block),),
        expert_index, tiles.order, tiles.expert, tiles.first, tiles.end, tiles.starts,
        expert_index.numel(), tiles.expert.numel(), x, signs, out, blocks,
        **row_tiles_constants(experts, block_m), INPUTS=x.shape[-1],
        **rotation_constants(block), num_warps=4,
    )  # fmt: skip
    return tiles
