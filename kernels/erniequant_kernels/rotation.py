# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Rotate inputs on the device: signs, then the Hadamard transform of blocks; or SwiGLU before both.

A rotated input is written as bfloat16. It is used by every chosen expert and every tile of outputs,
so it is written once rather than rotated where it is loaded.
"""

import math

import torch
import triton
import triton.language as tl
from torch.nn import functional

from erniequant.packing.rotation import rotate as rotate_plain
from erniequant.packing.rotation import unpack_signs
from erniequant_kernels.bfloat16 import from_pattern, rounded
from erniequant_kernels.dependent import start_next_and_wait
from erniequant_kernels.launch import launch
from erniequant_kernels.routing import assigned_scales

ELEMENTS = 1024
"""Channels that one program rotates."""


def rotate_reference(x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """`rotate_kernel` in plain torch, equal to the last bit."""
    return rotate_plain(x.float(), unpack_signs(signs, x.shape[-1]), block).to(torch.bfloat16)


def swiglu_rotate_reference(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor, signs: torch.Tensor,
    block: int, scaled: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`swiglu_rotate` in plain torch."""
    scales, _ = assigned_scales(scale, expert_index)
    y = partial.float().sum(0)
    gate, up = (y if scaled else y * scales).chunk(2, dim=-1)
    return rotate_reference(functional.silu(gate) * up, signs, block)


@triton.jit
def _butterflies(x, ROWS: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr):
    """Hadamard transform along the last dimension of ``[ROWS, BLOCK]``, in the format's order.

    Each turn adds and subtracts neighbours and moves the index bit that it used to the front; after
    as many turns as there are bits, all are back in place.
    """
    for _ in tl.static_range(ROOT):
        a, b = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, BLOCK))
    return x


@triton.constexpr_function
def _group(channels):
    """Channels that a lane loads together: eight where rows are whole numbers of them."""
    return math.gcd(channels, 8)


@triton.jit
def _places(first_block, blocks, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Where ROWS consecutive blocks lie in rows of CHANNELS.

    Row and channel are found once for neighbours, in 32 bits: divisions in 64 bits for every
    channel took half of all instructions.

    Returns:
        int32 ``[ROWS * BLOCK / neighbours, 1]``: rows after the first block's, and channels;
        whether the blocks are there; int32 ``[1, neighbours]``: what to add to channels.
    """
    NEIGHBOURS: tl.constexpr = _group(CHANNELS)
    place = tl.arange(0, ROWS * BLOCK // NEIGHBOURS)[:, None] * NEIGHBOURS
    inside = place < (blocks - first_block) * BLOCK
    place += first_block % (CHANNELS // BLOCK) * BLOCK
    channel = tl.multiple_of(place % CHANNELS, (NEIGHBOURS, 1))
    return place // CHANNELS, channel, inside, tl.arange(0, NEIGHBOURS)[None, :]


@triton.jit
def _rotated(x, signs_ptr, channel, neighbour, ROWS: tl.constexpr, BLOCK: tl.constexpr,
             ROOT: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Signs by channel, butterflies, norm: float32 in the shape of ``x``."""
    signs = tl.load(signs_ptr + channel // 32).to(tl.uint32, bitcast=True) >> (channel % 32)
    flip = (signs << (31 - neighbour)) & 0x80000000
    flipped = (x.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    turned = _butterflies(tl.reshape(flipped, (ROWS, BLOCK)), ROWS, BLOCK, ROOT)
    return tl.reshape(turned * NORM, x.shape)


@triton.jit
def rotate_kernel(
    x_ptr,
    signs_ptr,
    out_ptr,
    blocks,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Program FIRST + i rotates ROWS consecutive blocks of channels, of one token or more."""
    first_block = (tl.program_id(0) - FIRST) * ROWS
    _, channel, inside, neighbour = _places(first_block, blocks, INPUTS, BLOCK, ROWS)
    # Blocks follow one another in memory, whatever token they are of.
    base = first_block.to(tl.int64) * BLOCK
    offset = tl.arange(0, channel.shape[0])[:, None] * neighbour.shape[1] + neighbour
    x = tl.load(x_ptr + base + offset, mask=inside, other=0).to(tl.float32)
    rotated = _rotated(x, signs_ptr, channel, neighbour, ROWS, BLOCK, ROOT, NORM)
    tl.store(out_ptr + base + offset, rounded(rotated, tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def swiglu_rotate_kernel(
    partial_ptr,
    scale_ptr,
    expert_index_ptr,
    signs_ptr,
    out_ptr,
    rows,
    splits,
    EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """As `rotate_kernel`, of ``silu(gate) * up``; gate and up are sums of the splits, scaled."""
    start_next_and_wait(DEPENDENT)
    first_block = tl.program_id(0) * ROWS
    blocks = rows * (INNER // BLOCK)
    row, channel, inside, neighbour = _places(first_block, blocks, INNER, BLOCK, ROWS)
    first_row = first_block // (INNER // BLOCK)
    part = partial_ptr + first_row.to(tl.int64) * (2 * INNER)
    offset = row * (2 * INNER) + channel + neighbour
    gate = tl.load(part + offset, mask=inside, other=0).to(tl.float32)
    up = tl.load(part + offset + INNER, mask=inside, other=0).to(tl.float32)
    if not ONE_SPLIT:
        for _ in range(1, splits):
            part += rows.to(tl.int64) * (2 * INNER)
            gate += tl.load(part + offset, mask=inside, other=0).to(tl.float32)
            up += tl.load(part + offset + INNER, mask=inside, other=0).to(tl.float32)
    if not SCALED:
        expert = tl.load(expert_index_ptr + first_row + row, mask=inside, other=0)
        # A row that no expert computes is not read either; any scale will do.
        expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, 0).to(tl.int64)
        scale = scale_ptr + expert * (2 * INNER) + channel + neighbour
        gate *= from_pattern(tl.load(scale, mask=inside, other=0))
        up *= from_pattern(tl.load(scale + INNER, mask=inside, other=0))
    inner = gate / (1 + tl.exp(-gate)) * up
    rotated = _rotated(inner, signs_ptr, channel, neighbour, ROWS, BLOCK, ROOT, NORM)
    base = out_ptr + first_block.to(tl.int64) * BLOCK
    offset = tl.arange(0, channel.shape[0])[:, None] * neighbour.shape[1] + neighbour
    tl.store(base + offset, rounded(rotated, tl.bfloat16), mask=inside)


def rotation_programs(blocks: int, block: int) -> int:
    """Programs that rotate so many blocks of channels."""
    return triton.cdiv(blocks, ELEMENTS // block)


def rotation_constants(block: int) -> dict[str, int | float]:
    """Constexpr arguments of the kernels for a rotation block."""
    return {
        "BLOCK": block,
        "ROOT": block.bit_length() - 1,
        "NORM": block**-0.5,
        "ROWS": ELEMENTS // block,
    }


def swiglu_rotate(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor, signs: torch.Tensor,
    block: int, out: torch.Tensor, scaled: bool = False,
) -> None:  # fmt: skip
    """Rotate ``silu(gate) * up``, the inputs of the down projection.

    Args:
        partial: ``[splits, A, 2 * I]``, contiguous: summands of gate and up.
        scale: int16 ``[E, 2 * I]``, contiguous; expert_index: integer ``[A]``, no expert when out of
            range.
        signs: int32 ``[ceil(I / 32)]``.
        out: bfloat16 ``[A, I]``, contiguous; receives the result.
        scaled: the one split carries its scales; neither ``scale`` nor experts are looked at.
    """
    splits, rows, double = partial.shape
    blocks = rows * double // 2 // block
    launch(
        swiglu_rotate_kernel, (rotation_programs(blocks, block),),
        partial, scale, expert_index, signs, out, rows, splits,
        EXPERTS=scale.shape[0], INNER=double // 2, ONE_SPLIT=splits == 1, SCALED=scaled,
        num_warps=4, **rotation_constants(block),
    )  # fmt: skip
