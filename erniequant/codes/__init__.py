"""Convolutional codes: the family (spec, labels, registry), the reference decoder and the
encoders."""

from erniequant.codes.registry import CODE_NAMES, REGISTER_LENGTHS, code_for_bits, get_code
from erniequant.codes.spec import ConvolutionalCode

__all__ = ["CODE_NAMES", "REGISTER_LENGTHS", "ConvolutionalCode", "code_for_bits", "get_code"]
