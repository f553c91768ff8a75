"""Rotate rows of inputs in registers: signs, then the Hadamard transform of blocks of channels; or
SwiGLU before both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from llvmlite import ir
from torch.nn import functional

from erniequant.packing.rotation import rotate as rotate_plain
from erniequant.packing.rotation import unpack_signs
from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.machine import Machine
from erniequant_kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    POINTER,
    Code,
    integer,
    rounded_to_bfloat16,
    splat,
    vector,
)

LN2_HIGH = 0.693145751953125
"""ln(2) in 16 bits, so that its product with a power of two is exact."""


@dataclass(frozen=True)
class RotationSpec:
    """One compiled rotation.

    Attributes:
        inputs: channels of a row.
        block: channels that are transformed together.
        bfloat16: the result is bfloat16, else float32.
        swiglu: what is rotated is ``silu(gate) * up``, of rows with gate before up.
        inverse: undo it: the transform first, then signs.
    """

    inputs: int
    block: int
    bfloat16: bool
    swiglu: bool = False
    inverse: bool = False


def rotate_reference(
    x: torch.Tensor, signs: torch.Tensor, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """`rotation` in plain torch, equal to the last bit: float32 ``[rows, K]`` to ``dtype``."""
    return rotate_plain(x, unpack_signs(signs, x.shape[-1]), block).to(dtype)


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of float32 ``[rows, 2 * K]`` in plain torch."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


@cache
def rotation(spec: RotationSpec, machine: Machine) -> Callable[..., None]:
    """The compiled rotation.

    Its arguments are integers: number of rows, address of ``rows``, int64, the row of ``x`` that
    each row of the result is made of; addresses of ``x`` float32 ``[any, K]``, or ``[any, 2 * K]``
    with SwiGLU, of ``signs`` int32 ``[ceil(K / 32)]`` and of the result.
    """
    return compile_function(rotation_module(spec), "rotation", machine)


def rotation_module(spec: RotationSpec) -> ir.Module:
    """The code of `rotation`."""
    code = Code("rotation", [I64, *[POINTER] * 4])
    count, rows, x, signs, out = code.function.args
    out_bytes = 2 if spec.bfloat16 else 4
    width = spec.inputs * (2 if spec.swiglu else 1)

    def one_row(row: ir.Value, _: object) -> list[ir.Value]:
        source = code.load(I64, code.address(rows, code.at.mul(row, integer(8))))
        source = code.address(x, code.at.mul(source, integer(4 * width)))
        target = code.address(out, code.at.mul(row, integer(out_bytes * spec.inputs)))

        def one_block(channel: ir.Value, _: object) -> list[ir.Value]:
            place = code.address(source, code.at.mul(channel, integer(4)))
            values = code.load(vector(F32, spec.block), place)
            if spec.swiglu:
                up = code.load(vector(F32, spec.block), code.address(place, 4 * spec.inputs))
                values = code.at.fmul(_silu(code, values), up)
            if spec.inverse:
                values = _signed(code, _hadamard(code, values, spec.block), signs, channel)
            else:
                values = _hadamard(code, _signed(code, values, signs, channel), spec.block)
            place = code.address(target, code.at.mul(channel, integer(out_bytes)))
            code.store(rounded_to_bfloat16(code, values) if spec.bfloat16 else values, place)
            return []

        code.loop(integer(0), integer(spec.inputs), spec.block, [], one_block)
        return []

    code.loop(integer(0), count, 1, [], one_row)
    code.at.ret_void()
    return code.module


def _signed(code: Code, values: ir.Value, signs: ir.Value, channel: ir.Value) -> ir.Value:
    """Values of the channels from ``channel`` on, negative where the sign's bit is set."""
    at, lanes = code.at, values.type.count
    width = min(lanes, 32)
    word = code.address(signs, at.mul(at.udiv(channel, integer(32)), integer(4)))
    words = code.load(vector(I32, lanes // width), word)
    if width < 32:
        bits = at.trunc(at.urem(channel, integer(32)), I32)
        shifted = at.lshr(at.extract_element(words, ir.Constant(I32, 0)), bits)
        negative = at.bitcast(at.trunc(shifted, ir.IntType(width)), vector(ir.IntType(1), width))
    else:
        negative = at.bitcast(words, vector(ir.IntType(1), lanes))
    flipped = at.xor(at.bitcast(values, vector(I32, lanes)), splat(I32, lanes, 1 << 31))
    return at.select(negative, at.bitcast(flipped, values.type), values)


def _hadamard(code: Code, values: ir.Value, block: int) -> ir.Value:
    """Orthonormal Hadamard transform: neighbours ``half`` apart are added and subtracted."""
    half = 1
    while half < block:
        other = code.shuffle(values, [lane ^ half for lane in range(block)])
        sign = [-1.0 if lane & half else 1.0 for lane in range(block)]
        # In the upper half the sum begins with the other: a - b, not b - a.
        values = code.fused(values, ir.Constant(values.type, sign), other)
        half *= 2
    return code.at.fmul(values, splat(F32, block, block**-0.5))


def _silu(code: Code, x: ir.Value) -> ir.Value:
    """``x / (1 + exp(-x))``."""
    one = splat(F32, x.type.count, 1.0)
    return code.at.fdiv(x, code.at.fadd(one, _exp(code, code.at.fneg(x))))


def _exp(code: Code, x: ir.Value) -> ir.Value:
    """The exponential function, to two units in the last place; of less than -87 and more than 88,
    which float32 hardly holds, that of these."""
    at, lanes = code.at, x.type.count

    def number(value: float) -> ir.Constant:
        return splat(F32, lanes, value)

    x = at.select(at.fcmp_ordered("<", x, number(-87.0)), number(-87.0), x)
    x = at.select(at.fcmp_ordered(">", x, number(88.0)), number(88.0), x)
    # exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where seven terms of the series leave 5e-9.
    power = code.intrinsic(f"llvm.rint.v{lanes}f32", x.type, [at.fmul(x, number(1 / math.log(2)))])
    rest = code.fused(power, number(-LN2_HIGH), x)
    rest = code.fused(power, number(-(math.log(2) - LN2_HIGH)), rest)
    series = number(1 / math.factorial(7))
    for term in range(6, -1, -1):
        series = code.fused(series, rest, number(1 / math.factorial(term)))
    exponent = at.add(at.fptosi(power, vector(I32, lanes)), splat(I32, lanes, 127))
    scale = at.bitcast(at.shl(exponent, splat(I32, lanes, 23)), x.type)
    return at.fmul(series, scale)
