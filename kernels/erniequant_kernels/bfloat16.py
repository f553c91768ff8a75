# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Conversions to and from bfloat16 that are the same on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Operands of tl.dot go through `.to(MATRIX_TYPE)`: the interpreter computes with the bit patterns
# of bfloat16 as if they were integers, so there the same values are multiplied as float32.
MATRIX_TYPE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 to a float type, to nearest, ties to even; the interpreter truncates to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def from_pattern(pattern):
    """int16 bit patterns of bfloat16 numbers, as scales are stored, to float32."""
    return (pattern.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
