"""A checkpoint's tokenizer, from its own files only: no code of the checkpoint, no path that leads
out of its folder."""

from pathlib import Path
from typing import Any

from erniequant.checkpoint.reader import read_json
from erniequant.checkpoint.strict_json import is_plain_file_name
from erniequant.errors import ErnieQuantError, foreign_errors

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_SETTINGS_FILE = "tokenizer_config.json"
# transformers' own leftover of the machine that saved the file; nothing opens it.
_NEVER_OPENED = "special_tokens_map_file"


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint comes with a tokenizer at all."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path, or_else: str = "") -> Any:
    """The tokenizer of a checkpoint folder; ``or_else`` tells what to do when there is none.

    Raises:
        ErnieQuantError: it has none, or its files are damaged or name files elsewhere.
    """
    if (folder / _SETTINGS_FILE).exists():
        _refuse_paths(folder / _SETTINGS_FILE)
    from transformers import AutoTokenizer

    advice = f" ({or_else})" if or_else else ""
    with foreign_errors(f"no tokenizer can be loaded from {folder}{advice}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _refuse_paths(path: Path) -> None:
    for key, value in read_json(path).items():
        outside = isinstance(value, str) and not is_plain_file_name(value)
        if key.endswith("_file") and key != _NEVER_OPENED and outside:
            raise ErnieQuantError(
                f"{path} names the file {value!r} as {key}, which is not in its folder; remove it"
            )
