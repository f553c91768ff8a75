"""The codes that a file may name, and the multiplier that belongs to each register length.

Everything here is part of the on-disk format: a published constant never changes, a new one gets a
new name. docs/codes.md shows how the labels and multipliers were chosen.
"""

from erniequant.codes import labels
from erniequant.codes.spec import ConvolutionalCode
from erniequant.errors import ErnieQuantError

REGISTER_LENGTHS = {"fast": 10, "standard": 12, "max": 16}
"""Register length of each encoder effort."""

# name -> (bits, weights per step, label name, {register length: multiplier})
_MEMBERS: dict[str, tuple[int, int, str, dict[int, int]]] = {
    "cc2": (2, 2, "pair", {n: 0x8F9CE7AD for n in range(8, 17)}),
    "cc3": (3, 1, "half_sum", {n: 0x8F9CE7AD for n in range(8, 17)}),
    "cc4": (4, 1, "half_sum", {n: 0x8F9CE7AD for n in range(8, 17)}),
}

CODE_NAMES = tuple(_MEMBERS)


def get_code(name: str, register_length: int) -> ConvolutionalCode:
    """The code called ``name`` with a register of ``register_length`` bits.

    Raises:
        ErnieQuantError: no such code, or no multiplier is defined for that register length.
    """
    if name not in _MEMBERS:
        raise ErnieQuantError(f"unknown code {name!r}; this version knows {', '.join(CODE_NAMES)}")
    bits, weights_per_step, label, multipliers = _MEMBERS[name]
    if register_length not in multipliers:
        known = ", ".join(str(n) for n in multipliers)
        raise ErnieQuantError(
            f"code {name} has no register length {register_length!r}; this version knows {known}"
        )
    return ConvolutionalCode(
        name,
        bits,
        weights_per_step,
        register_length,
        multipliers[register_length],
        labels.LABELS[label],
        label,
    )


def code_for_bits(bits: int, register_length: int) -> ConvolutionalCode:
    """The native code of a nominal width of 2, 3 or 4 bits."""
    return get_code(f"cc{bits}", register_length)
