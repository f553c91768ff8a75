"""Integer, logic and comparison instructions as functions of unsigned arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np

from erniequant_kernels.ptx.values import SIGNED, UNSIGNED, Array, bits_of, dtype_of, view

Function = Callable[..., Array]

_COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def compare(name: str, kind: str) -> Function:
    """``setp``; names with a trailing ``u`` are also true for not-a-number."""
    unordered = name.endswith("u") and name not in {"lo", "ls"}
    function = _COMPARE[name[:-1] if unordered and name not in _COMPARE else name]

    def compared(a: Array, b: Array) -> Array:
        a, b = view(a, kind), view(b, kind)
        result = function(a, b)
        if kind[0] == "f":
            nan = np.isnan(a) | np.isnan(b)
            result = (result | nan) if unordered else (result & ~nan)
        return result

    return compared


def _shift(name: str, kind: str) -> Function:
    bits, dtype = bits_of(kind), dtype_of(kind)

    def shifted(a: Array, by: Array) -> Array:
        a = view(a, kind)
        # Shifts by the width or more give nothing, or copies of the sign.
        last = np.minimum(by, bits - 1).astype(dtype)
        if name == "shl":
            return np.where(by >= bits, dtype(0), a << last)
        return np.where(by >= bits, dtype(0), a >> last) if kind[0] != "s" else a >> last

    return shifted


def _high(kind: str) -> Function:
    bits = bits_of(kind)
    if bits < 64:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]
        return lambda a, b: (
            (view(a, kind).astype(wide) * view(b, kind).astype(wide)) >> wide(bits)
        ).astype(dtype_of(kind))

    def high(a: Array, b: Array) -> Array:
        half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        middle = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
        other = (a & low) * (b >> half) + (middle & low)
        top = (a >> half) * (b >> half) + (middle >> half) + (other >> half)
        if kind[0] == "s":
            for one, two in ((a, b), (b, a)):
                top = top - np.where(one >> np.uint64(63) != 0, two, np.uint64(0))
        return top

    return high


def _wide(kind: str) -> Function:
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits_of(kind)]
    return lambda a, b: view(a, kind).astype(wide) * view(b, kind).astype(wide)


def _multiply(which: str, kind: str) -> Function:
    if which == "hi":
        return _high(kind)
    if which == "wide":
        return _wide(kind)
    return lambda a, b: view(a, kind) * view(b, kind)


def _multiply_add(which: str, kind: str) -> Function:
    product = _multiply(which, kind)
    sum_kind = kind[0] + str(bits_of(kind) * (2 if which == "wide" else 1))
    return lambda a, b, c: product(a, b) + view(c, sum_kind)


def _extract(kind: str) -> Function:
    """``bfe``: a field by position and length, extended by its own sign if signed."""
    bits, dtype = bits_of(kind), UNSIGNED[bits_of(kind)]

    def extracted(a: Array, position: Array, length: Array) -> Array:
        position = (position & 0xFF).astype(dtype)
        length = np.minimum(length & 0xFF, bits).astype(dtype)
        moved = np.where(position >= bits, dtype(0), a >> np.minimum(position, dtype(bits - 1)))
        if kind[0] == "s":
            moved = np.where(
                position >= bits, view(a, kind) >> SIGNED[bits](bits - 1),
                view(a, kind) >> np.minimum(position, dtype(bits - 1)).astype(SIGNED[bits]),
            ).view(dtype)  # fmt: skip
        unused = np.minimum(bits - length, bits - 1).astype(dtype)
        field = (moved << unused).astype(dtype)
        shifted = field.view(SIGNED[bits]) >> unused.astype(SIGNED[bits])
        field = shifted.view(dtype) if kind[0] == "s" else field >> unused
        return np.where(length == 0, dtype(0), field)

    return extracted


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """``bfi.b32``: the low ``length`` bits of ``a`` into ``b``."""
    field = ((np.uint64(1) << (length & 0xFF).astype(np.uint64)) - np.uint64(1)) << (
        position & 0xFF
    ).astype(np.uint64)
    placed = a.astype(np.uint64) << (position & 0xFF).astype(np.uint64)
    return ((placed & field) | (b.astype(np.uint64) & ~field)).astype(np.uint32)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """``prmt.b32``: four bytes out of the eight of ``b:a``."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result: Array = np.uint32(0)
    for place in range(4):
        nibble = ((selector >> np.uint32(4 * place)) & np.uint32(15)).astype(np.uint64)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint64(8) != 0, sign, byte)
        result = result | (byte << np.uint64(8 * place)).astype(np.uint32)
    return result


def _table(a: Array, b: Array, c: Array, table: Array) -> Array:
    """``lop3.b32``: a logic function of three by its truth table."""
    result: Array = np.uint32(0)
    for row in range(8):
        if int(table) >> row & 1:
            chosen = [v if row & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (chosen[0] & chosen[1] & chosen[2])
    return result


def _funnel(direction: str, clamped: bool) -> Function:
    def shifted(low: Array, high: Array, by: Array) -> Array:
        by = (np.minimum(by, 32) if clamped else by & np.uint32(31)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        if direction == "r":
            return (both >> by).astype(np.uint32)
        return ((both << by) >> np.uint64(32)).astype(np.uint32)

    return shifted


def _leading_zeros(a: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    count = np.full(np.shape(a), bits, np.uint32)
    for place in range(bits):
        count = np.where(a >> a.dtype.type(place) != 0, np.uint32(bits - 1 - place), count)
    return count


def _ones(a: Array) -> Array:
    places = range(8 * a.dtype.itemsize)
    return sum(((a >> a.dtype.type(p)) & a.dtype.type(1)).astype(np.uint32) for p in places)


def _reverse(a: Array) -> Array:
    result = np.zeros_like(a)
    for place in range(8 * a.dtype.itemsize):
        bit = (a >> a.dtype.type(place)) & a.dtype.type(1)
        result |= bit << a.dtype.type(8 * a.dtype.itemsize - 1 - place)
    return result


def _divide(kind: str, remainder: bool) -> Function:
    def divided(a: Array, b: Array) -> Array:
        a, b = view(a, kind), view(b, kind)
        safe = np.where(b == 0, b.dtype.type(1), b)
        quotient = a // safe
        # PTX rounds towards zero, numpy down.
        short = (quotient * safe != a) & ((a < 0) != (safe < 0))
        quotient = quotient + short.astype(quotient.dtype)
        return a - quotient * safe if remainder else quotient

    return divided


def _pair(function: Function) -> Function:
    """A function of 16-bit numbers as one of pairs of them in 32 bits."""

    def paired(*values: Array) -> Array:
        low = function(*((v & np.uint32(0xFFFF)).astype(np.uint16) for v in values))
        high = function(*((v >> np.uint32(16)).astype(np.uint16) for v in values))
        low, high = (half.view(np.uint16).astype(np.uint32) for half in (low, high))
        return low | high << np.uint32(16)

    return paired


def integer_function(parts: list[str]) -> Function | None:
    """The function of an opcode split at its dots, or None if it is not an integer one."""
    name, kind = parts[0], parts[-1]
    modifiers = set(parts[1:-1])
    if kind == "pred" or kind[0] == "b":
        logic: dict[str, Function] = {
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            "not": np.invert, "brev": _reverse, "prmt": permute, "lop3": _table, "bfi": _insert,
            "popc": _ones, "clz": _leading_zeros,
        }  # fmt: skip
        if name == "shf":
            return _funnel(parts[1], "clamp" in modifiers)
        if name in {"shl", "shr"}:
            return _shift(name, kind)
        return logic.get(name)
    if kind[0] not in "su":
        return None
    if kind.endswith("16x2"):
        function = integer_function([*parts[:-1], kind.removesuffix("x2")])
        return function and _pair(function)
    simple: dict[str, Any] = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "abs": np.abs,
        "neg": np.negative,
    }  # fmt: skip
    if name in simple and not modifiers:
        function = simple[name]
        return lambda *values: function(*(view(v, kind) for v in values))
    which = next((m for m in ("lo", "hi", "wide") if m in modifiers), "")
    if name in {"mul", "mad"} and which:
        return _multiply(which, kind) if name == "mul" else _multiply_add(which, kind)
    if name in {"shl", "shr"}:
        return _shift(name, kind)
    if name == "bfe":
        return _extract(kind)
    if name in {"div", "rem"}:
        return _divide(kind, name == "rem")
    return None
