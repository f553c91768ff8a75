# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Decode helpers for Triton kernels: windows of the bit stream, registers to bfloat16 labels.

A kernel tile holds *groups* of stream bits, one per row, and decodes step ``i`` of every group at
once with constant shifts; weights then stay in the registers that the matrix instruction reads. A
group is one 32-bit word where the step divides 32, three bytes (eight steps) for 3-bit steps.
"""

import torch
import triton
import triton.language as tl

from erniequant.codes import labels
from erniequant.codes.spec import WORD_BITS, ConvolutionalCode

TOGGLE_BITS = tl.constexpr(labels.TOGGLE_BITS)

# Operands of tl.dot go through `.to(MATRIX_TYPE)`: the interpreter computes with the bit patterns
# of bfloat16 as if they were integers, so there the same values are multiplied as float32.
MATRIX_TYPE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


def group_bits(code: ConvolutionalCode) -> int:
    """Stream bits of one group: a whole number of steps and of bytes, at most one word."""
    return WORD_BITS if WORD_BITS % code.step_bits == 0 else 24


def constants(device: torch.device | str) -> torch.Tensor:
    """What kernels load instead of computing (see `load_keep_bits`): int32 ``[5]``.

    The label mask, then the shift of each 24-bit group in a cycle of four (three words).
    """
    keep_bits = labels.KEEP_BITS - (1 << WORD_BITS)
    return torch.tensor([keep_bits, 8, 16, 24, 0], dtype=torch.int32, device=device)


@triton.jit
def last_word(group, GROUP_BITS: tl.constexpr):
    """Index of the word that holds the last bit of a group."""
    return ((group + 1) * GROUP_BITS - 1) // 32


@triton.jit
def load_keep_bits(constants_ptr):
    """The label mask as a ``[1, 1]`` tile; call it inside the loop.

    The masking instruction takes one immediate. A second constant is rebuilt by a move for every
    label (sm_90) or splits the instruction in two (sm_80); a loaded one stays in a register: 3.6
    instead of 4.6 issue slots per 2-bit weight on sm_80. It must be a tile: Triton decodes in the
    layout of the matrix operand only what follows from loaded tiles by elementwise operations.
    """
    zero = tl.arange(0, 1)
    return tl.load(constants_ptr + zero[:, None] + zero[None, :]).to(tl.uint32, bitcast=True)


@triton.jit
def load_shifts(constants_ptr, group):
    """Bits of the last word that come after each 24-bit group: uint32 ``[groups, 1]``."""
    return tl.load(constants_ptr + 1 + group[:, None] % 4).to(tl.uint32, bitcast=True)


@triton.jit
def align_group(previous, last, shifts):
    """The 32 bits that end with each 24-bit group, and the bits before those.

    ``previous`` and ``last`` are uint32 words, cyclically adjacent. The second result has at least
    8 valid bits; 16-bit registers reach back 5. 32-bit groups are ``last`` and ``previous`` as is.
    """
    joined = (previous.to(tl.uint64) << 32) | last.to(tl.uint64)
    return (joined >> shifts.to(tl.uint64)).to(tl.uint32), previous >> shifts


@triton.jit
def register(before, newest, DISTANCE: tl.constexpr, LENGTH: tl.constexpr):
    """The register whose newest bit lies ``DISTANCE`` bits before the end of the group.

    16-bit registers at multiples of 4 bits are byte extracts of two words (as they are, and shifted
    by 4 once per group), most of them one permute; shorter ones cost a shift and a mask.
    """
    mask: tl.constexpr = (1 << LENGTH) - 1
    if LENGTH == 16 and DISTANCE % 8 == 4:
        if DISTANCE == 28:
            bits = (((before >> 4) & 0xFF) << 8) | (_funnel(before, newest, 4) >> 24)
        else:
            bits = (_funnel(before, newest, 4) >> (DISTANCE - 4)) & mask
    elif LENGTH == 16 and DISTANCE == 24:
        bits = ((before & 0xFF) << 8) | (newest >> 24)
    elif DISTANCE + LENGTH <= 32:
        bits = (newest >> DISTANCE) & mask
    else:
        bits = _funnel(before, newest, DISTANCE) & mask
    return bits


@triton.jit
def _funnel(before, newest, DISTANCE: tl.constexpr):
    return (((before.to(tl.uint64) << 32) | newest.to(tl.uint64)) >> DISTANCE).to(tl.uint32)


@triton.jit
def _bfloat16(pattern):
    return pattern.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def pair(register_bits, keep_bits, MULTIPLIER: tl.constexpr):
    """Label ``pair``: uint32 registers to the two bfloat16 weights of a step, in order."""
    multiplier = tl.full((), MULTIPLIER, tl.uint32)
    halves = ((register_bits * multiplier) & keep_bits) ^ TOGGLE_BITS
    return _bfloat16(halves & 0xFFFF), _bfloat16(halves >> 16)


@triton.jit
def half_sum(register_bits, keep_bits, MULTIPLIER: tl.constexpr):
    """Label ``half_sum``: uint32 registers to the one bfloat16 weight of a step."""
    low, high = pair(register_bits, keep_bits, MULTIPLIER)
    # Exact, and compiled to packed bfloat16 additions; see MATRIX_TYPE for why it is written so.
    return (low.to(tl.float32) + high.to(tl.float32)).to(tl.bfloat16)
