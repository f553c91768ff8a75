"""The codes that a file may name, one row each, and the code of each width and effort.

Rows are part of the on-disk format: a published constant never changes, a new one gets a new name.
docs/codes.md shows how labels, multipliers and scales were chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from erniequant.codes.labels import HALF_SUM, PAIR, Label
from erniequant.codes.spec import ConvolutionalCode
from erniequant.errors import ErnieQuantError


@dataclass(frozen=True)
class CodeRow:
    """All that the library knows of one code.

    Attributes:
        bits: per weight.
        label: how a register becomes weights; kernels choose their decoder by its name.
        multipliers: odd 32-bit factors by register length. Those below have the least error of 480
            (L <= 12) to 30 (L = 16) random ones on Gaussian data.
        target_std: standard deviation of the scaled targets over that of the labels, best on
            N(0, 1).
        encode_rate: weights per second and core that the encoder finds at register length 12, on an
            AVX-512 server core; each register bit more halves it.
    """

    bits: int
    label: Label
    multipliers: Mapping[int, int]
    target_std: float
    encode_rate: float


_RATED_LENGTH = 12

CODES = {
    "cc2": CodeRow(
        bits=2,
        label=PAIR,
        multipliers={
            8: 0x45C16C71,
            9: 0x7CA3694B,
            10: 0x9C7E8FCB,
            11: 0x82C4715F,
            12: 0x8F39E161,
            13: 0xEB945FB5,
            14: 0x899E2839,
            15: 0xA69A8B89,
            16: 0x93E6BC43,
        },
        target_std=0.96,
        encode_rate=3.9e6,
    ),
    "cc2s": CodeRow(
        bits=2,
        label=HALF_SUM,
        multipliers={
            8: 0x74F3ABFF,
            9: 0x68FDB383,
            10: 0x523C5ECB,
            11: 0x8398C0C1,
            12: 0x582D6C9D,
            13: 0x5D0F3233,
            14: 0x518CAD05,
            15: 0xF3895985,
            16: 0xD33CB44F,
        },
        target_std=0.98,
        encode_rate=2.5e6,
    ),
    "cc3": CodeRow(
        bits=3,
        label=HALF_SUM,
        multipliers={
            8: 0xEDA09CD3,
            9: 0x5A1C28CB,
            10: 0xE1E836FF,
            11: 0x78404F7D,
            12: 0xDAC43A8F,
            13: 0x4D58D98B,
            14: 0x83FB20B7,
            15: 0x737B4E41,
            16: 0xDA8CDBFF,
        },
        target_std=0.92,
        encode_rate=2.0e6,
    ),
    "cc4": CodeRow(
        bits=4,
        label=HALF_SUM,
        multipliers={
            8: 0xB5FA5C69,
            9: 0x5A1C28CB,
            10: 0xAE3FF167,
            11: 0x9A5F88FD,
            12: 0xC4BCB17B,
            13: 0xCEE04E0F,
            14: 0xCF5FD7B9,
            15: 0x824EF67F,
            16: 0x59B4E6DB,
        },
        target_std=0.88,
        encode_rate=3.6e6,
    ),
}
"""Every code, by name."""

CODE_OF_BITS = {2: "cc2", 3: "cc3", 4: "cc4"}
"""The code that a nominal width is quantised with, unless an effort takes another."""

# At the longest register cc2s has 5 % less error than cc2; its search takes twice as long.
_CODES_OF_EFFORTS = {("max", 2): "cc2s"}

# Register length by bits. Standard stays above 300,000 weights a second on two cores with room to
# spare; at 3 and 4 bits one more bit lowers the error by 3 and 4 %, at 2 bits by less than 1 %.
_REGISTER_LENGTHS = {
    "fast": {2: 10, 3: 10, 4: 10},
    "standard": {2: 12, 3: 13, 4: 13},
    "max": {2: 16, 3: 16, 4: 16},
}

EFFORTS = tuple(_REGISTER_LENGTHS)
"""How hard the encoder searches, least first."""

CODE_NAMES = tuple(CODES)

REGISTERED = tuple((name, length) for name, row in CODES.items() for length in row.multipliers)
"""Name and register length of every code that a file may name."""


def register_length(bits: int, effort: str) -> int:
    """Register length that codes of ``bits`` bits have at an effort of `EFFORTS`."""
    return _REGISTER_LENGTHS[effort][bits]


def get_code(name: str, register_length: int) -> ConvolutionalCode:
    """The code called ``name`` with a register of ``register_length`` bits.

    Raises:
        ErnieQuantError: no such code, or no multiplier is defined for that register length.
    """
    if name not in CODES:
        raise ErnieQuantError(f"unknown code {name!r}; this version knows {', '.join(CODES)}")
    row = CODES[name]
    if register_length not in row.multipliers:
        known = ", ".join(map(str, row.multipliers))
        raise ErnieQuantError(
            f"code {name} has no register length {register_length!r}; this version knows {known}"
        )
    multiplier = row.multipliers[register_length]
    return ConvolutionalCode(name, row.bits, register_length, multiplier, row.label)


def code_for_bits(bits: int, register_length: int) -> ConvolutionalCode:
    """The native code of a nominal width of 2, 3 or 4 bits."""
    return get_code(CODE_OF_BITS[bits], register_length)


def chosen_code(bits: int, effort: str, name: str | None = None) -> ConvolutionalCode:
    """The native code of a nominal width of 2, 3 or 4 bits at an effort of `EFFORTS`.

    Args:
        name: of another code of this width; the register is as long as the effort says.

    Raises:
        ErnieQuantError: no such code, or it has another width.
    """
    usual = _CODES_OF_EFFORTS.get((effort, bits), CODE_OF_BITS[bits])
    code = get_code(usual if name is None else name, register_length(bits, effort))
    if code.bits != bits:
        fitting = " or ".join(other for other, row in CODES.items() if row.bits == bits)
        raise ErnieQuantError(
            f"code {name} has {code.bits} bits, not {bits}; use --bits {code.bits}, or {fitting}"
        )
    return code


def encode_rate(code: ConvolutionalCode) -> float:
    """Weights per second and core that the encoder of a code finds, roughly."""
    return CODES[code.name].encode_rate * 2.0 ** (_RATED_LENGTH - code.register_length)


def target_std(code: ConvolutionalCode) -> float:
    """Standard deviation of the scaled targets over that of the labels, see `CodeRow`."""
    return CODES[code.name].target_std
