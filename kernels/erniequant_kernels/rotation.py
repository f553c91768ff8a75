# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Rotate inputs on the device: signs, then the Hadamard transform of blocks; or SwiGLU before both.

A rotated input is written as bfloat16. It is used by every chosen expert and every tile of outputs,
so it is written once rather than rotated where it is loaded.
"""

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
    block: int,
) -> torch.Tensor:  # fmt: skip
    """`swiglu_rotate` in plain torch."""
    scales, _ = assigned_scales(scale, expert_index)
    gate, up = (partial.float().sum(0) * scales).chunk(2, dim=-1)
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


@triton.jit
def _rotated(x, signs_ptr, channel, ROWS: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr,
             NORM: tl.constexpr):  # fmt: skip
    """Signs by channel, butterflies, norm: float32 ``[ROWS, BLOCK]``."""
    negative = (tl.load(signs_ptr + channel // 32) >> (channel % 32)) & 1
    return _butterflies(tl.where(negative != 0, -x, x), ROWS, BLOCK, ROOT) * NORM


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
    index = (tl.program_id(0) - FIRST).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = (index // (INPUTS // BLOCK))[:, None]
    channel = (index % (INPUTS // BLOCK) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (index < blocks)[:, None] & (channel < INPUTS)
    x = tl.load(x_ptr + token * INPUTS + channel, mask=inside, other=0).to(tl.float32)
    rotated = _rotated(x, signs_ptr, channel, ROWS, BLOCK, ROOT, NORM)
    tl.store(out_ptr + token * INPUTS + channel, rounded(rotated, tl.bfloat16), mask=inside)


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
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """As `rotate_kernel`, of ``silu(gate) * up``; gate and up are sums of the splits, scaled."""
    start_next_and_wait(DEPENDENT)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = (index // (INNER // BLOCK))[:, None]
    channel = (index % (INNER // BLOCK) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (channel < INNER)
    expert = tl.load(expert_index_ptr + row, mask=row < rows, other=0)
    # A row that no expert computes is not read either; any scale will do.
    expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, 0).to(tl.int64)
    gate = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    up = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for split in range(0, splits):
        part = partial_ptr + (split * rows + row) * (2 * INNER) + channel
        gate += tl.load(part, mask=inside, other=0).to(tl.float32)
        up += tl.load(part + INNER, mask=inside, other=0).to(tl.float32)
    scale = scale_ptr + expert * (2 * INNER) + channel
    gate *= from_pattern(tl.load(scale, mask=inside, other=0))
    up *= from_pattern(tl.load(scale + INNER, mask=inside, other=0))
    inner = gate / (1 + tl.exp(-gate)) * up
    rotated = _rotated(inner, signs_ptr, channel, ROWS, BLOCK, ROOT, NORM)
    tl.store(out_ptr + row * INNER + channel, rounded(rotated, tl.bfloat16), mask=inside)


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
    block: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """Rotate ``silu(gate) * up``, the inputs of the down projection.

    Args:
        partial: ``[splits, A, 2 * I]``, contiguous: summands of gate and up before their scales.
        scale: int16 ``[E, 2 * I]``; expert_index: integer ``[A]``, no expert when out of range.
        signs: int32 ``[ceil(I / 32)]``.
        out: bfloat16 ``[A, I]``, contiguous; receives the result.
    """
    splits, rows, double = partial.shape
    blocks = rows * double // 2 // block
    launch(
        swiglu_rotate_kernel, (rotation_programs(blocks, block),),
        partial, scale, expert_index, signs, out, rows, splits,
        EXPERTS=scale.shape[0], INNER=double // 2, num_warps=4, **rotation_constants(block),
    )  # fmt: skip
