"""Checkpoints that FastDeploy serves: experts in WINT2 and wint4, everything else in wint8.

docs/fastdeploy.md describes the layout and how far it is verified. Everything is imported on first
use: `recognise` is asked of every folder, also where nothing else here is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erniequant.formats.fastdeploy.export import detect_k_order, export_bf16
    from erniequant.formats.fastdeploy.reader import (
        FastDeployCheckpoint,
        check_folder,
        open_fastdeploy,
    )
    from erniequant.formats.fastdeploy.recognise import is_fastdeploy_wint2
    from erniequant.formats.fastdeploy.wint4 import quantize_wint4

_MODULES = {
    "FastDeployCheckpoint": "reader",
    "check_folder": "reader",
    "detect_k_order": "export",
    "export_bf16": "export",
    "is_fastdeploy_wint2": "recognise",
    "open_fastdeploy": "reader",
    "quantize_wint4": "wint4",
}

__all__ = [
    "FastDeployCheckpoint",
    "check_folder",
    "detect_k_order",
    "export_bf16",
    "is_fastdeploy_wint2",
    "open_fastdeploy",
    "quantize_wint4",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        module = importlib.import_module(f"erniequant.formats.fastdeploy.{_MODULES[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'erniequant.formats.fastdeploy' has no attribute {name!r}")
