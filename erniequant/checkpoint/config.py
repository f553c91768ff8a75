"""JSON files of a checkpoint, above all config.json.

Entries that say nothing are left out, and so are those that name Python code of the folder, which
does not go with the weights.
"""

from pathlib import Path
from typing import Any

from erniequant.checkpoint.pointers import refuse_pointer
from erniequant.checkpoint.strict_json import parse_json, read_bounded
from erniequant.errors import ErnieQuantError

CONFIG_FILE = "config.json"
QUANTIZED_BY = ("quantization_config", "compression_config")
"""Entries under which config.json says how weights are quantised; the second is the older name of
compressed-tensors."""

CODE_ENTRIES = ("auto_map", "custom_pipelines")
"""Entries that name Python files, for ``trust_remote_code``."""

_MAX_JSON_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ErnieQuantError: it is missing, damaged, or a Git LFS pointer.
    """
    try:
        data = read_bounded(path, _MAX_JSON_BYTES)
        refuse_pointer(path, data)
        contents = parse_json(data)
    except FileNotFoundError as error:
        raise ErnieQuantError(
            f"{path.parent} has no {path.name}; it is not a checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ErnieQuantError(f"{path} cannot be read: {reason}") from error
    if not isinstance(contents, dict):
        raise ErnieQuantError(f"{path} does not hold a JSON object")
    return contents


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as `plain_settings` leaves it. Raises ErnieQuantError as
    `read_json`."""
    return plain_settings(read_json(folder / CONFIG_FILE))


def plain_settings(settings: Any) -> Any:
    """Settings, at any depth, without entries that name code or describe no quantisation.

    null and {} are what other tools write where nothing is quantised; transformers stops at some of
    them.
    """
    if isinstance(settings, list):
        return [plain_settings(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: plain_settings(value)
        for key, value in settings.items()
        if key not in CODE_ENTRIES and not (key in QUANTIZED_BY and value in (None, {}))
    }


def quantized_by(settings: Any) -> str | None:
    """A description of the quantisation that a config.json declares; None if it declares none.

    The declaration may be in a part, such as ``text_config``.
    """
    if not isinstance(settings, dict):
        return None
    for key in QUANTIZED_BY:
        if (declared := settings.get(key)) not in (None, {}):
            # FastDeploy's name for it is the second.
            names = ("quant_method", "quantization") if isinstance(declared, dict) else ()
            named = [f"{name} {declared[name]!r}" for name in names if name in declared]
            return f"{key} with {named[0]}" if named else f"{key} {str(declared)[:60]}"
    parts = ((name, quantized_by(part)) for name, part in settings.items())
    return next((f"{words} in {name}" for name, words in parts if words), None)
