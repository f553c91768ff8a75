# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Decode helpers for Triton kernels: bytes of WINT2 to the operand of a matrix instruction.

What makes it cheap (counts: `erniequant bench static`), for a byte, which is four weights:

* The byte is cut out where it lies and becomes a float32 number by its bits: no conversion. One
  multiply-add takes both offsets off again and rounds as a multiplication does.
* Labels of two inputs are cut out together, as the halves of a register. With 128 added by their
  exponents they are bfloat16 numbers; one multiply-add of both takes 160 off, for 32 and 128, and
  applies the local scale, so the scale costs nothing.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from erniequant_kernels.bfloat16 import INTERPRETED, rounded
from erniequant_kernels.decode import funnel
from erniequant_kernels.launch import kept_on_device

GROUP = tl.constexpr(64)
GROUP_BYTES = tl.constexpr(16)

_ADD_128 = 0x43004300
"""Or-ed to a pair of integers below 128, it makes the bfloat16 numbers 128 + integer."""

_ADD_2_23 = 0x4B000000
"""Or-ed to an integer below 2^23, it makes the float32 number 2^23 + integer."""

TWO_23 = tl.constexpr(float(1 << 23))
LABEL_PAIR = tl.constexpr(0x003F003F)
NIBBLE_PAIR = tl.constexpr(0x000F000F)
# Pairs of bfloat16 numbers.
PAIR_1, PAIR_MINUS_128 = tl.constexpr(0x3F803F80), tl.constexpr(0xC300C300)
PAIR_MINUS_160, PAIR_20480 = tl.constexpr(0xC320C320), tl.constexpr(0x46A046A0)


@kept_on_device
def wint2_constants(device: torch.device) -> torch.Tensor:
    """What the kernel loads instead of computing: int32 ``[2]``.

    An instruction takes one immediate; a second one is moved into a register over and over, a
    loaded one stays there.
    """
    return torch.tensor([_ADD_128, _ADD_2_23], dtype=torch.int32, device=device)


@triton.jit
def fma_pairs(a, b, c):
    """``a * b + c`` of pairs of bfloat16 numbers in uint32, rounded once."""
    if INTERPRETED:
        low = _low(a) * _low(b) + _low(c)
        high = _low(a >> 16) * _low(b >> 16) + _low(c >> 16)
        return _pattern(low) | (_pattern(high) << 16)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.uint32, True, 1
        )


@triton.jit
def _low(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _pattern(x):
    return rounded(x, tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _halves(pair):
    """A pair of bfloat16 numbers, the low one first, along a new last dimension."""
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def four_bytes(byte0, byte1, byte2, byte3):
    """What four bytes of a word became, ``[..., 2, 2]`` in the order of the bytes."""
    return tl.join(tl.join(byte0, byte2), tl.join(byte1, byte3))


@triton.jit
def byte_numbers(words, add_2_23):
    """The bytes of words as float32 numbers: 2^23 + byte, times 256 at odd places: it is cut out
    where it lies, and its scale makes up for it."""
    upper = words >> 16
    return four_bytes(
        (words & 0xFF) | add_2_23, (words & 0xFF00) | add_2_23,
        (upper & 0xFF) | add_2_23, (upper & 0xFF00) | add_2_23,
    )  # fmt: skip


@triton.jit
def code_words(number, scale, offset, code_zp):
    """``floor(byte * code_scale + code_zp + 0.5)`` with every step rounded, as uint32.

    number: from `byte_numbers`; ``scale`` is ``code_scale``, divided by 256 at odd places, and
    ``offset`` is ``-scale * 2^23``: the first step is exact before it is rounded.
    """
    number = number.to(tl.float32, bitcast=True)
    if INTERPRETED:
        value = (number - TWO_23) * scale + code_zp + 0.5
        return tl.floor(value).to(tl.int32).to(tl.uint32, bitcast=True)
    else:
        value = tl.fma(number, scale, offset) + code_zp + 0.5
        return libdevice.float2int_rd(value).to(tl.uint32, bitcast=True)


@triton.jit
def label_pairs(word, add_128):
    """The four labels of a word plus 160, as two pairs of bfloat16 numbers.

    Labels are at bits 9, 6, 3 and 0. Each pair is shifted into place together, its first label to
    bit 0 and its second one to bit 16.
    """
    low = word * (1 << 13)
    first = funnel(word, low, 22)
    second = funnel(word, low, 16)
    return (first & LABEL_PAIR) | add_128, (second & LABEL_PAIR) | add_128


@triton.jit
def _twice(word, BYTE: tl.constexpr):
    """Byte ``BYTE`` of words, at bit 0 and at bit 16."""
    if INTERPRETED:
        return ((word >> (8 * BYTE)) & 0xFF) * 0x10001
    elif BYTE == 0:
        return _permuted_bytes(word, "prmt.b32 $0, $1, 0, 0x4040;")
    elif BYTE == 1:
        return _permuted_bytes(word, "prmt.b32 $0, $1, 0, 0x4141;")
    elif BYTE == 2:
        return _permuted_bytes(word, "prmt.b32 $0, $1, 0, 0x4242;")
    else:
        return _permuted_bytes(word, "prmt.b32 $0, $1, 0, 0x4343;")


@triton.jit
def _permuted_bytes(word, INSTRUCTION: tl.constexpr):
    return tl.inline_asm_elementwise(INSTRUCTION, "=r,r", [word], tl.uint32, True, 1)


@triton.jit
def nibble_pairs(word):
    """The bytes of words of local scales, each at bit 0 and at bit 16."""
    return four_bytes(_twice(word, 0), _twice(word, 1), _twice(word, 2), _twice(word, 3))


@triton.jit
def local_scales(nibbles, add_128):
    """Pairs of ``scale`` and of ``-160 * scale`` from nibbles at bits 0 and 16; all is exact."""
    raised = (nibbles & NIBBLE_PAIR) | add_128
    scale = fma_pairs(raised, _uint32(PAIR_1), _uint32(PAIR_MINUS_128))
    return scale, fma_pairs(raised, _uint32(PAIR_MINUS_160), _uint32(PAIR_20480))


@triton.jit
def _uint32(VALUE: tl.constexpr):
    return tl.full((), VALUE, tl.uint32)


@triton.jit
def local_offsets(block, BLOCK_N: tl.constexpr, OUTPUTS: tl.constexpr):
    """Words of the local scales of a block of outputs, from those of a turn: ``[BLOCK_N / 4]``."""
    word = tl.arange(0, BLOCK_N // 4)
    return _word_of(block, word // 8, word % 8, BLOCK_N, OUTPUTS)


@triton.jit
def code_offsets(
    block, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OUTPUTS: tl.constexpr, MMA64: tl.constexpr
):
    """Words of codes of a block of outputs and BLOCK_K inputs: ``[BLOCK_N * BLOCK_K / 16]``.

    Dimensions: 16 inputs, 32 outputs, lane of four, eight words, which are a sector. In this order
    the lanes of a warp read them from shared memory side by side.
    """
    SECTORS: tl.constexpr = BLOCK_N // 32
    word = tl.arange(0, BLOCK_N * BLOCK_K // 16)
    lane = word // 8 % 4
    k16 = word // (32 * SECTORS)
    # In mma64's order byte 4 a + b holds inputs 16 b + 2 a, + 1, + 8 and + 9 of its group.
    byte = lane * 4 + k16 if MMA64 else k16 * 4 + lane
    offset = _word_of(block, word // 32 % SECTORS, word % 8, BLOCK_N, OUTPUTS)
    return tl.max_contiguous(tl.multiple_of(byte * (OUTPUTS // 4) + offset, 8), 8)


@triton.jit
def _word_of(block, sector, word, BLOCK_N: tl.constexpr, OUTPUTS: tl.constexpr):
    """Out of range means: the last sector again; its products are not stored."""
    sector += block * (BLOCK_N // 32)
    if OUTPUTS % BLOCK_N != 0:
        sector = tl.minimum(sector, OUTPUTS // 32 - 1)
    return tl.max_contiguous(tl.multiple_of(sector * 8 + word, 8), 8)


@triton.jit
def local_rows(nibbles, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """`nibble_pairs` of the words at `local_offsets` as ``[BLOCK_N, 1]``; see `code_rows`."""
    words = tl.reshape(nibbles, (WARPS, 8, BLOCK_N // WARPS // 32, 2, 2))
    return tl.reshape(tl.permute(words, (2, 3, 0, 4, 1)), (BLOCK_N, 1))


@triton.jit
def code_rows(numbers, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr):
    """`byte_numbers` of the words at `code_offsets` as rows of the operand,
    ``[BLOCK_N, BLOCK_K / 4]``.

    A lane of the matrix instruction holds rows ``l // 4`` and ``l // 4 + 8`` of each 16, and warps
    take 16 rows in turn. The outputs of all of a lane's rows are neighbours, so it reads whole
    words: `output_of_row`.
    """
    MINE: tl.constexpr = BLOCK_N // WARPS // 32  # words of a lane, and sectors of a warp
    words = tl.reshape(numbers, (BLOCK_K // 16, WARPS, MINE, 4, 8 // MINE, MINE, 2, 2))
    # To: word of the lane, high bit of the byte, warp, its low bit, lane of eight; inputs.
    words = tl.permute(words, (5, 6, 1, 7, 2, 4, 0, 3))
    return tl.reshape(words, (BLOCK_N, BLOCK_K // 4))


@triton.jit
def output_of_row(BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """Which of a program's outputs each row of the operand is: ``[BLOCK_N]``."""
    row = tl.arange(0, BLOCK_N)
    lane = row // 16 % WARPS * 8 + row % 8
    return lane * (BLOCK_N // WARPS // 8) + row // (16 * WARPS) * 2 + row // 8 % 2


@triton.jit
def by_output(rows, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr):
    """Rows of the product in the order of outputs: what `output_of_row` says, undone."""
    rows = tl.reshape(rows, (BLOCK_N // WARPS // 32, 2, WARPS, 2, 8, BLOCK_M))
    return tl.reshape(tl.permute(rows, (2, 4, 0, 1, 3, 5)), (BLOCK_N, BLOCK_M))


@triton.jit
def operand_inputs(
    x, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, MMA64: tl.constexpr, WARP_GROUP: tl.constexpr
):
    """Inputs ``[BLOCK_K, BLOCK_M]`` in the order of `operand`.

    Of every 16 inputs, the instruction of warp groups has 2 l, 2 l + 1, 2 l + 8 and 2 l + 9 in lane
    ``l`` (of four): that is a byte in mma64's order. The other one has, as Triton loads it, four
    neighbours: a byte in plain order.
    """
    if MMA64 and not WARP_GROUP:
        x = tl.permute(tl.reshape(x, (BLOCK_K // 16, 2, 4, 2, BLOCK_M)), (0, 2, 1, 3, 4))
    elif WARP_GROUP and not MMA64:
        x = tl.permute(tl.reshape(x, (BLOCK_K // 16, 4, 2, 2, BLOCK_M)), (0, 2, 1, 3, 4))
    return tl.reshape(x, (BLOCK_K, BLOCK_M))


@triton.jit
def operand(first, second, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARP_GROUP: tl.constexpr):
    """Pairs of scaled labels ``[BLOCK_N, BLOCK_K / 4]`` as bfloat16 ``[BLOCK_N, BLOCK_K]``."""
    both = tl.join(_halves(first), _halves(second))
    # Dimensions: output, 16 inputs, lane, label of a pair, pair.
    both = tl.reshape(both, (BLOCK_N, BLOCK_K // 16, 4, 2, 2))
    if WARP_GROUP:
        return tl.reshape(tl.permute(both, (0, 1, 4, 2, 3)), (BLOCK_N, BLOCK_K))
    else:
        return tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), (BLOCK_N, BLOCK_K))
