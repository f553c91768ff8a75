"""The codes that a file may name, and the multiplier that belongs to each register length.

Everything here is part of the on-disk format: a published constant never changes, a new one gets a
new name. docs/codes.md shows how the labels and multipliers were chosen.
"""

from erniequant.codes import labels
from erniequant.codes.spec import ConvolutionalCode
from erniequant.errors import ErnieQuantError

# Register length by bits. Standard stays above 300,000 weights a second on two cores with room to
# spare; at 3 and 4 bits one more bit lowers the error by 3 and 4 %, at 2 bits by less than 1 %.
_REGISTER_LENGTHS = {
    "fast": {2: 10, 3: 10, 4: 10},
    "standard": {2: 12, 3: 13, 4: 13},
    "max": {2: 16, 3: 16, 4: 16},
}

EFFORTS = tuple(_REGISTER_LENGTHS)
"""How hard the encoder searches, least first."""

# Odd multipliers with the least error of 480 (L <= 12) to 30 (L = 16) random ones on Gaussian data.
_MULTIPLIERS = {
    "cc2": {
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
    "cc3": {
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
    "cc4": {
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
}

# name -> (bits, weights per step, label name)
_MEMBERS = {"cc2": (2, 2, "pair"), "cc3": (3, 1, "half_sum"), "cc4": (4, 1, "half_sum")}

# Weights per second and core that the encoder finds at register length 12, on an AVX-512 server
# core; each register bit more halves the rate.
_ENCODE_RATES = {"cc2": 1_700_000, "cc3": 900_000, "cc4": 1_200_000}
_RATED_LENGTH = 12

CODE_NAMES = tuple(_MEMBERS)

REGISTERED = tuple((name, length) for name in _MEMBERS for length in _MULTIPLIERS[name])
"""Name and register length of every code that a file may name."""


def register_length(bits: int, effort: str) -> int:
    """Register length that codes of ``bits`` bits have at an effort of `EFFORTS`."""
    return _REGISTER_LENGTHS[effort][bits]


def get_code(name: str, register_length: int) -> ConvolutionalCode:
    """The code called ``name`` with a register of ``register_length`` bits.

    Raises:
        ErnieQuantError: no such code, or no multiplier is defined for that register length.
    """
    if name not in _MEMBERS:
        raise ErnieQuantError(f"unknown code {name!r}; this version knows {', '.join(CODE_NAMES)}")
    bits, weights_per_step, label = _MEMBERS[name]
    multipliers = _MULTIPLIERS[name]
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


def encode_rate(code: ConvolutionalCode) -> float:
    """Weights per second and core that the encoder of a code finds, roughly."""
    return float(_ENCODE_RATES[code.name]) * 2.0 ** (_RATED_LENGTH - code.register_length)


def code_for_bits(bits: int, register_length: int) -> ConvolutionalCode:
    """The native code of a nominal width of 2, 3 or 4 bits."""
    return get_code(f"cc{bits}", register_length)
