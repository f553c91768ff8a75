"""Values of registers: unsigned numpy arrays over lanes, read as the type an opcode names."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}
_IMMEDIATE = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")

Array = Any
"""An unsigned numpy array over lanes, or one numpy number for all."""


def bits_of(kind: str) -> int:
    """Width of a type: ``b32``, ``s64``, ``bf16``, ``bf16x2``, ``f32``; 1 for ``pred``."""
    if kind == "pred":
        return 1
    number, _, many = re.sub(r"^[a-z]+", "", kind).partition("x")
    return int(number) * int(many or 1)


def dtype_of(kind: str) -> Any:
    """How numpy reads a value of an integer or float type; bfloat16 stays as its bits."""
    if kind == "pred":
        return np.bool_
    table = {"s": SIGNED, "f": FLOAT}.get(kind[0], UNSIGNED)
    return table[bits_of(kind)]


def immediate(text: str, bits: int) -> Array | None:
    """A written number as an unsigned one of ``bits``, or None if it is not one."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.uint32(int(text[2:], 16))
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return np.uint64(int(text[2:], 16))
    if _IMMEDIATE.fullmatch(text):
        number = int(text.rstrip("U"), 0)
        return np.bool_(number != 0) if bits == 1 else UNSIGNED[bits](number % (1 << bits))
    return None


def view(value: Array, kind: str) -> Array:
    """Read an unsigned value as a type; a wider register gives its low bits."""
    if kind == "pred":
        return value
    bits = bits_of(kind)
    if value.dtype.itemsize * 8 != bits:
        value = value.astype(UNSIGNED[bits])
    return value.view(dtype_of(kind))


def unsigned(value: Array, bits: int) -> Array:
    """The bits of a typed value, extended by its sign to the width of a register."""
    if value.dtype == np.bool_:
        return value
    if value.dtype.kind == "i" and value.dtype.itemsize * 8 < bits:
        value = value.astype(SIGNED[bits])
    return value.view(UNSIGNED[value.dtype.itemsize * 8]).astype(UNSIGNED[bits], copy=False)


def from_bfloat16(bits: Array) -> Array:
    """float32 of the low 16 bits."""
    return ((bits.astype(np.uint32) & np.uint32(0xFFFF)) << np.uint32(16)).view(np.float32)


def to_bfloat16(value: Array) -> Array:
    """Bits of float32 numbers rounded to the nearest bfloat16, ties to even; uint32."""
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded)


def packed(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of float32 numbers applied to both bfloat16 halves of registers."""

    def both(*values: Array) -> Array:
        low = to_bfloat16(function(*map(from_bfloat16, values)))
        high = to_bfloat16(function(*(from_bfloat16(v >> np.uint32(16)) for v in values)))
        return low | (high << np.uint32(16))

    return both
