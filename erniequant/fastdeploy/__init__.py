"""Checkpoints that FastDeploy serves: experts in WINT2 and wint4, everything else in wint8.

docs/fastdeploy.md describes the layout, and what of it is verified.
"""

from erniequant.fastdeploy.config import is_fastdeploy_wint2
from erniequant.fastdeploy.exporting import detect_k_order, export_bf16
from erniequant.fastdeploy.reader import FastDeployCheckpoint, check_folder, open_fastdeploy
from erniequant.fastdeploy.wint4 import quantize_wint4
from erniequant.fastdeploy.writer import WrittenFastDeploy, write_fastdeploy

__all__ = [
    "FastDeployCheckpoint",
    "WrittenFastDeploy",
    "check_folder",
    "detect_k_order",
    "export_bf16",
    "is_fastdeploy_wint2",
    "open_fastdeploy",
    "quantize_wint4",
    "write_fastdeploy",
]
