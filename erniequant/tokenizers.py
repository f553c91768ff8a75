"""A checkpoint's tokenizer, from its own files only: no code of the checkpoint, no path that leads
out of its folder."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from erniequant.checkpoint.files import disk_error, write_file
from erniequant.checkpoint.reader import read_json
from erniequant.checkpoint.strict_json import is_plain_file_name
from erniequant.errors import ErnieQuantError, foreign_errors

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_SETTINGS_FILE = "tokenizer_config.json"
# transformers' own leftover of the machine that saved the file; nothing opens it.
_NEVER_OPENED = "special_tokens_map_file"
# Of the code that comes with Baidu's vision-language checkpoints; transformers knows no such class.
_CLASS_OF_ITS_OWN = "Ernie4_5_VLTokenizer"


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint comes with a tokenizer at all."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def is_of_own_code(folder: Path) -> bool:
    """Whether transformers would need code of the checkpoint for a tokenizer that we can make."""
    present = {name for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if present != {"tokenizer.model", _SETTINGS_FILE}:
        return False
    return read_json(folder / _SETTINGS_FILE).get("tokenizer_class") == _CLASS_OF_ITS_OWN


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
        if is_of_own_code(folder):
            from erniequant.sentencepiece_tokenizer import sentencepiece_tokenizer

            return sentencepiece_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def write_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Write a tokenizer so that transformers loads it without other code; returns the files' names.

    Raises:
        ErnieQuantError: the disk refuses.
    """
    try:
        with TemporaryDirectory() as made:
            tokenizer.save_pretrained(made)
            contents = {path.name: path.read_bytes() for path in sorted(Path(made).iterdir())}
    except OSError as error:
        raise disk_error(folder, error) from error
    for name, content in contents.items():
        _write(folder / name, content)
    return list(contents)


def _write(path: Path, content: bytes) -> None:
    write_file(path, lambda file: file.write(content))


def _refuse_paths(path: Path) -> None:
    for key, value in read_json(path).items():
        outside = isinstance(value, str) and not is_plain_file_name(value)
        if key.endswith("_file") and key != _NEVER_OPENED and outside:
            raise ErnieQuantError(
                f"{path} names the file {value!r} as {key}, which is not in its folder; remove it"
            )
