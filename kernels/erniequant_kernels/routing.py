# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Sort the chosen (token, expert) assignments by expert, without leaving the device.

Matrix products over experts run in *row tiles*: up to ``block_m`` assignments of one expert. How
many there are depends on the routing; their largest possible number does not, so the launch has a
fixed shape and needs no answer from the device (CUDA graphs).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from erniequant.packing.decoding import decode_scale
from erniequant_kernels.launch import empty, launch

SCAN = 1024


@dataclass(frozen=True)
class RowTiles:
    """Assignments in order of their experts, cut into row tiles.

    Attributes:
        order: int32 ``[A]``, assignment (``token * top_k + slot``) by position, sorted by expert
            and, within one, by assignment. Assignments to no expert are left out at the end.
        expert: int32 ``[tiles]``, expert of each row tile, -1 beyond the last.
        first, end: int32 ``[tiles]``, range of positions of each row tile.
        starts: int32 ``[E + 1]``, the first row tile of each expert, then their number.
        block_m: most assignments in a row tile.
    """

    order: torch.Tensor
    expert: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    starts: torch.Tensor
    block_m: int


def most_row_tiles(assignments: int, experts: int, block_m: int) -> int:
    """Row tiles that any routing can need: every expert may have one that is not full."""
    return min(assignments, assignments // block_m + experts)


def row_tiles_reference(expert_index: torch.Tensor, experts: int, block_m: int) -> RowTiles:
    """`row_tiles` in plain torch; an index outside ``[0, experts)`` means no expert."""
    chosen = expert_index.flatten()
    assignments = chosen.numel()
    tiles = most_row_tiles(assignments, experts, block_m)
    order = torch.zeros(assignments, dtype=torch.int32)
    expert = torch.full((tiles,), -1, dtype=torch.int32)
    first, end = torch.zeros_like(expert), torch.zeros_like(expert)
    starts = torch.zeros(experts + 1, dtype=torch.int32)
    position = tile = 0
    for e in range(experts):
        starts[e] = tile
        mine = torch.where(chosen == e)[0]
        order[position : position + mine.numel()] = mine
        for offset in range(0, mine.numel(), block_m):
            expert[tile] = e
            first[tile] = position + offset
            end[tile] = position + min(offset + block_m, mine.numel())
            tile += 1
        position += mine.numel()
    starts[experts] = tile
    return RowTiles(order, expert, first, end, starts, block_m)


def assigned_scales(
    scale: torch.Tensor, expert_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For references: scales ``[E, N]`` of each assignment's expert, and whether it has one."""
    valid = (expert_index >= 0) & (expert_index < scale.shape[0])
    return decode_scale(scale)[torch.where(valid, expert_index, 0)], valid


@triton.jit(do_not_specialize=["assignments", "tiles"])
def row_tiles_kernel(
    index_ptr,
    order_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    starts_ptr,
    assignments,
    tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One program per expert: it counts all experts, then lists its own assignments and tiles."""
    mine = tl.program_id(0)
    expert = tl.arange(0, BINS)
    lane = tl.arange(0, SCAN)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    start = 0
    while start < assignments:
        chosen = tl.load(index_ptr + start + lane, mask=start + lane < assignments, other=-1)
        # Assignments to no expert, and the padding of the last scan, count as one beyond.
        nobody = (chosen < 0) | (chosen >= EXPERTS)
        counts += tl.histogram(tl.where(nobody, EXPERTS, chosen).to(tl.int32), BINS)
        start += SCAN
    expert_tiles = (counts + BLOCK_M - 1) // BLOCK_M
    position = tl.sum(tl.where(expert < mine, counts, 0), axis=0)
    count = tl.sum(tl.where(expert == mine, counts, 0), axis=0)
    tile = tl.sum(tl.where(expert < mine, expert_tiles, 0), axis=0)
    used = tl.sum(tl.where(expert < EXPERTS, expert_tiles, 0), axis=0)
    tl.store(starts_ptr + mine, tile)
    if mine == 0:
        tl.store(starts_ptr + EXPERTS, used)
        start = used
        while start < tiles:
            tl.store(expert_ptr + start + lane, -1, mask=start + lane < tiles)
            start += SCAN

    start = 0
    while start < (count + BLOCK_M - 1) // BLOCK_M:
        offset = (start + lane) * BLOCK_M
        inside = offset < count
        tl.store(expert_ptr + tile + start + lane, mine, mask=inside)
        tl.store(first_ptr + tile + start + lane, position + offset, mask=inside)
        end = position + tl.minimum(offset + BLOCK_M, count)
        tl.store(end_ptr + tile + start + lane, end, mask=inside)
        start += SCAN

    start = 0
    while start < assignments:
        chosen = tl.load(index_ptr + start + lane, mask=start + lane < assignments, other=-1)
        is_mine = (chosen == mine).to(tl.int32)
        rank = position + tl.cumsum(is_mine, axis=0) - 1
        tl.store(order_ptr + rank, start + lane, mask=is_mine == 1)
        position += tl.sum(is_mine, axis=0)
        start += SCAN


@triton.jit
def tile_assignments(
    order_ptr, tile_first_ptr, tile_end_ptr, row_tile, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The assignments of a row tile, int64 ``[BLOCK_M]``, and which of them are there.

    Beyond the tile it is assignment 0 again: computed like the others, and not to be stored.
    """
    position = tl.load(tile_first_ptr + row_tile) + tl.arange(0, BLOCK_M)
    inside = position < tl.load(tile_end_ptr + row_tile)
    return tl.load(order_ptr + position, mask=inside, other=0).to(tl.int64), inside


def empty_row_tiles(expert_index: torch.Tensor, experts: int, block_m: int) -> RowTiles:
    """Memory for the row tiles of a routing, to be filled by `row_tiles_kernel`."""
    assignments = expert_index.numel()
    tiles = most_row_tiles(assignments, experts, block_m)

    def numbers(size: int) -> torch.Tensor:
        return empty(size, torch.int32, expert_index.device)

    return RowTiles(
        numbers(assignments), numbers(tiles), numbers(tiles), numbers(tiles), numbers(experts + 1),
        block_m,
    )  # fmt: skip


def row_tiles_constants(experts: int, block_m: int) -> dict[str, int]:
    """Constexpr arguments of `row_tiles_kernel`."""
    return {
        "EXPERTS": experts,
        "BINS": triton.next_power_of_2(experts + 1),
        "BLOCK_M": block_m,
        "SCAN": SCAN,
    }


def row_tiles(expert_index: torch.Tensor, experts: int, block_m: int) -> RowTiles:
    """Row tiles of a routing.

    Args:
        expert_index: int64 or int32 ``[T, k]``, contiguous; other values than ``0 .. experts - 1``
            mean no expert.
    """
    result = empty_row_tiles(expert_index, experts, block_m)
    launch(
        row_tiles_kernel, (experts,),
        expert_index, result.order, result.expert, result.first, result.end, result.starts,
        expert_index.numel(), result.expert.numel(), num_warps=4,
        **row_tiles_constants(experts, block_m),
    )  # fmt: skip
    return result
