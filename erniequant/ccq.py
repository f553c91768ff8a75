"""Baidu's CCQ formats: decoders of WINT2, WINT2.5 and WINT2.75, and an encoder of WINT2."""

from erniequant.codes.ccq.decode import decode_wint2, decode_wint25, decode_wint275
from erniequant.codes.ccq.order import K_ORDERS, stored_rows
from erniequant.formats.fastdeploy.ccq.encode import EncodedWint2, encode_matrix, encode_wint2

__all__ = [
    "K_ORDERS",
    "EncodedWint2",
    "decode_wint2",
    "decode_wint25",
    "decode_wint275",
    "encode_matrix",
    "encode_wint2",
    "stored_rows",
]
