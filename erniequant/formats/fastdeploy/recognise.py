"""Recognises FastDeploy checkpoints. Asked of every folder, so nothing heavy is imported."""

from collections.abc import Mapping
from typing import Any


def is_fastdeploy_wint2(config: Mapping[str, Any]) -> bool:
    """True if a config.json describes a FastDeploy checkpoint with WINT2 experts."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quantization") == "wint2"
