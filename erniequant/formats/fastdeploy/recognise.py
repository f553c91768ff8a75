"""Is this a checkpoint of FastDeploy? Asked of every folder, so nothing heavy is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erniequant.checkpoint.config import CONFIG_FILE, read_json
from erniequant.paths import expanded


def is_fastdeploy_wint2(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a checkpoint of FastDeploy with WINT2 experts."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quantization") == "wint2"


def is_fastdeploy_folder(source: str | Path) -> bool:
    """Whether a local folder is a checkpoint of FastDeploy with WINT2, in rank folders or not."""
    path = expanded(source) / CONFIG_FILE
    return path.is_file() and is_fastdeploy_wint2(read_json(path))
