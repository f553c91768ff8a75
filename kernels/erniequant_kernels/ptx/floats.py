"""Floating-point instructions and conversions as functions of unsigned arrays.

``ftz`` is ignored. A fused multiply-add goes through float64, which rounds twice in rare cases, and
approximate functions are numpy's: results are close to a card's, not equal in every bit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from erniequant_kernels.ptx.values import (
    Array,
    bits_of,
    dtype_of,
    from_bfloat16,
    packed,
    to_bfloat16,
    unsigned,
    view,
)  # fmt: skip

Function = Callable[..., Array]


def _fused(a: Array, b: Array, c: Array) -> Array:
    wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return wide.astype(a.dtype)


_FUNCTIONS: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative,
    "min": np.fmin, "max": np.fmax, "abs": np.abs, "fma": _fused, "mad": _fused, "ex2": np.exp2,
    "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


def float_function(parts: list[str]) -> Function | None:
    """The function of an opcode split at its dots, or None if it is not a float one."""
    function, kind = _FUNCTIONS.get(parts[0]), parts[-1]
    if function is None:
        return None
    if kind == "bf16x2":
        return packed(function)
    if kind == "bf16":
        return lambda *values: to_bfloat16(function(*map(from_bfloat16, values)))
    if kind in {"f16", "f32", "f64"}:
        return lambda *values: function(*(view(v, kind) for v in values))
    return None


def _half(value: Array) -> Array:
    """Bits of float32 numbers rounded to float16; uint32."""
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


def _read(value: Array, kind: str) -> Array:
    return from_bfloat16(value) if kind == "bf16" else view(value, kind)


def conversion(parts: list[str]) -> Function | None:
    """``cvt``, by the types of result and argument that end the opcode."""
    to, source = parts[-2], parts[-1]
    modifiers = set(parts[1:-2])
    if "satfinite" in modifiers or "sat" in modifiers or modifiers & {"rp", "rm", "rz"}:
        return None
    if to == "bf16x2" and source == "f32":
        # The first argument goes to the upper half.
        return lambda high, low: (
            (to_bfloat16(view(high, "f32")) << np.uint32(16)) | to_bfloat16(view(low, "f32"))
        )
    if to == "f16x2" and source == "f32":
        return lambda high, low: (
            (_half(view(high, "f32")) << np.uint32(16)) | _half(view(low, "f32"))
        )
    if to == "bf16":
        return lambda a: to_bfloat16(_read(a, source).astype(np.float32))
    if to[0] not in "suf" or (source[0] not in "suf" and source != "bf16"):
        return None
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    round_up = next((rounding[m] for m in modifiers if m in rounding), None)
    limits = np.iinfo(dtype_of(to)) if to[0] in "su" else None

    def converted(a: Array) -> Array:
        value = _read(a, source)
        if round_up is not None:
            value = round_up(value)
        if limits is not None and value.dtype.kind == "f":
            # Out of range gives the nearest integer, not-a-number zero.
            value = np.nan_to_num(value.astype(np.float64), posinf=np.inf, neginf=-np.inf)
            return np.clip(value, limits.min, limits.max).astype(dtype_of(to))
        return unsigned(value, bits_of(to)).view(dtype_of(to)) if limits else value.astype(
            dtype_of(to)
        )  # fmt: skip

    return converted
