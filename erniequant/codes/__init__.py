"""Convolutional codes: the family (spec, labels, registry), the reference decoder and the
encoders."""

from erniequant.codes.registry import (
    CODE_NAMES,
    EFFORTS,
    REGISTERED,
    chosen_code,
    code_for_bits,
    encode_rate,
    get_code,
    register_length,
)
from erniequant.codes.spec import ConvolutionalCode

__all__ = [
    "CODE_NAMES",
    "EFFORTS",
    "REGISTERED",
    "ConvolutionalCode",
    "chosen_code",
    "code_for_bits",
    "encode_rate",
    "get_code",
    "register_length",
]
