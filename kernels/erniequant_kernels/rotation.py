# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Rotate inputs on the device: signs, then the Hadamard transform of blocks; or SwiGLU before both.

A rotated input is written as bfloat16 in the form that its consumer multiplies with (`Form`). It is
used by every chosen expert and every tile of outputs, so it is written once rather than rotated
where it is loaded.
"""

from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch.nn import functional

from erniequant.codes.spec import ConvolutionalCode
from erniequant.packing.rotation import rotate as rotate_plain
from erniequant.packing.rotation import unpack_signs
from erniequant_kernels.bfloat16 import from_pattern, rounded
from erniequant_kernels.launch import launch
from erniequant_kernels.routing import assigned_scales

ELEMENTS = 1024
"""Channels that one program rotates."""


class Form(IntEnum):
    """How rotated inputs are laid out; see `erniequant_kernels.decode.operand`."""

    PLAIN = 0
    """``[rows, K]``: as they are."""
    TWICE = 1
    """``[rows, 1, 2 * K]``: each input twice in a row, which sums the halves of a product."""
    EITHER = 2
    """``[rows, 2, 2 * K]``: first before a zero, then after one; takes the low or high half."""


_FORM_OF_LABEL = {"pair": Form.EITHER, "half_sum": Form.TWICE}


def form_of(code: ConvolutionalCode) -> Form:
    """What the packed product of a code wants: its label decides."""
    return _FORM_OF_LABEL[code.label.name]


def form_shape(rows: int, inputs: int, form: Form) -> tuple[int, ...]:
    """Shape of ``rows`` rotated inputs."""
    return (rows, inputs) if form is Form.PLAIN else (rows, int(form), 2 * inputs)


def arrange_reference(x: torch.Tensor, form: Form) -> torch.Tensor:
    """Inputs ``[rows, K]`` in a form."""
    if form is Form.PLAIN:
        return x
    if form is Form.TWICE:
        return x.repeat_interleave(2, dim=-1)[:, None]
    zero = torch.zeros_like(x)
    either = (torch.stack(pair, dim=-1).flatten(-2) for pair in ((x, zero), (zero, x)))
    return torch.stack(list(either), dim=1)


def rotate_reference(x: torch.Tensor, signs: torch.Tensor, block: int, form: Form) -> torch.Tensor:
    """`rotate_kernel` in plain torch, equal to the last bit."""
    rotated = rotate_plain(x.float(), unpack_signs(signs, x.shape[-1]), block)
    return arrange_reference(rotated.to(torch.bfloat16), form)


def swiglu_rotate_reference(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor, signs: torch.Tensor,
    block: int, form: Form,
) -> torch.Tensor:  # fmt: skip
    """`swiglu_rotate` in plain torch."""
    scales, _ = assigned_scales(scale, expert_index)
    gate, up = (partial.float().sum(0) * scales).chunk(2, dim=-1)
    return rotate_reference(functional.silu(gate) * up, signs, block, form)


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
def _store(out_ptr, x, row, channel, inside, INPUTS: tl.constexpr, FORM: tl.constexpr):
    """Write ``[ROWS, BLOCK]`` of one row each in a form."""
    x = rounded(x, tl.bfloat16)
    if FORM == 0:
        tl.store(out_ptr + row * INPUTS + channel, x, mask=inside)
    else:
        place = out_ptr + (row * (2 * FORM * INPUTS) + 2 * channel)[:, :, None]
        place += tl.arange(0, 2)[None, None, :]
        inside = (inside & (channel < INPUTS))[:, :, None]
        if FORM == 1:
            tl.store(place, tl.join(x, x), mask=inside)
        else:
            zero = tl.zeros_like(x)
            tl.store(place, tl.join(x, zero), mask=inside)
            tl.store(place + 2 * INPUTS, tl.join(zero, x), mask=inside)


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
    FORM: tl.constexpr,
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
    _store(out_ptr, rotated, token, channel, inside, INPUTS, FORM)


@triton.jit
def swiglu_rotate_kernel(
    partial_ptr,
    scale_ptr,
    expert_index_ptr,
    signs_ptr,
    out_ptr,
    rows,
    EXPERTS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    NORM: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """As `rotate_kernel`, of ``silu(gate) * up``; gate and up are sums of SPLITS parts, scaled."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = (index // (INNER // BLOCK))[:, None]
    channel = (index % (INNER // BLOCK) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (channel < INNER)
    expert = tl.load(expert_index_ptr + row, mask=row < rows, other=0)
    # A row that no expert computes is not read either; any scale will do.
    expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, 0).to(tl.int64)
    gate = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    up = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        part = partial_ptr + (split * rows + row) * (2 * INNER) + channel
        gate += tl.load(part, mask=inside, other=0).to(tl.float32)
        up += tl.load(part + INNER, mask=inside, other=0).to(tl.float32)
    scale = scale_ptr + expert * (2 * INNER) + channel
    gate *= from_pattern(tl.load(scale, mask=inside, other=0))
    up *= from_pattern(tl.load(scale + INNER, mask=inside, other=0))
    inner = gate / (1 + tl.exp(-gate)) * up
    rotated = _rotated(inner, signs_ptr, channel, ROWS, BLOCK, ROOT, NORM)
    _store(out_ptr, rotated, row, channel, inside, INNER, FORM)


def rotation_programs(blocks: int, block: int) -> int:
    """Programs that rotate so many blocks of channels."""
    return triton.cdiv(blocks, ELEMENTS // block)


def rotation_constants(block: int, form: Form) -> dict[str, int | float]:
    """Constexpr arguments of the kernels for a rotation block and a form."""
    return {
        "BLOCK": block,
        "ROOT": block.bit_length() - 1,
        "NORM": block**-0.5,
        "FORM": int(form),
        "ROWS": ELEMENTS // block,
    }


def swiglu_rotate(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor, signs: torch.Tensor,
    block: int, form: Form, out: torch.Tensor,
) -> None:  # fmt: skip
    """Rotate ``silu(gate) * up``, the inputs of the down projection.

    Args:
        partial: ``[splits, A, 2 * I]``, contiguous: summands of gate and up before their scales.
        scale: int16 ``[E, 2 * I]``; expert_index: integer ``[A]``, no expert when out of range.
        signs: int32 ``[ceil(I / 32)]``.
        out: bfloat16 of `form_shape` (A rows); receives the result.
    """
    splits, rows, double = partial.shape
    blocks = rows * double // 2 // block
    launch(
        swiglu_rotate_kernel, (rotation_programs(blocks, block),),
        partial, scale, expert_index, signs, out, rows,
        EXPERTS=scale.shape[0], INNER=double // 2, SPLITS=splits, num_warps=4,
        **rotation_constants(block, form),
    )  # fmt: skip
