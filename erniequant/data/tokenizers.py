"""A checkpoint's tokenizer, from its own files only: no code of the checkpoint, no path that leads
out of its folder."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from erniequant.checkpoint.config import (
    CODE_ENTRIES,
    CONFIG_FILE,
    plain_settings,
    read_config,
    read_json,
)
from erniequant.checkpoint.files import disk_error, write_file, write_json
from erniequant.checkpoint.folder import companion_files, require_whole_companions
from erniequant.checkpoint.strict_json import is_plain_file_name
from erniequant.errors import ErnieQuantError, wrap_errors

SETTINGS_FILE = "tokenizer_config.json"
_FAST_FILE = "tokenizer.json"
_TOKENIZER_FILES = (_FAST_FILE, "tokenizer.model", SETTINGS_FILE)
# transformers' own leftover of the machine that saved the file; nothing opens it.
_NEVER_OPENED = "special_tokens_map_file"
# A class of the code in Baidu's vision-language checkpoints; transformers has none of that name.
_CLASS_OF_ITS_OWN = "Ernie4_5_VLTokenizer"
# A class of the code in Baidu's first text checkpoints; transformers makes the same ids from the
# sentencepiece model.
_SAME_AS_ITS_MODEL = "Ernie4_5_Tokenizer"
# Makes what tokenizer.json, or a conversion of tokenizer.model, describes.
_GENERAL_CLASS = "PreTrainedTokenizerFast"


def has_tokenizer(folder: Path) -> bool:
    """True if a checkpoint comes with a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def is_of_own_code(folder: Path) -> bool:
    """True if transformers would need code of the checkpoint for a tokenizer that we can make."""
    present = {name for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if present != {"tokenizer.model", SETTINGS_FILE}:
        return False
    return read_json(folder / SETTINGS_FILE).get("tokenizer_class") == _CLASS_OF_ITS_OWN


def settings_without_code(folder: Path) -> dict[str, Any] | None:
    """tokenizer_config.json in place of one that names code; None if it names none.

    Raises:
        ErnieQuantError: it is damaged, or transformers has no class to do without the code.
    """
    settings = read_json(folder / SETTINGS_FILE)
    kept = {key: value for key, value in settings.items() if key not in CODE_ENTRIES}
    if kept == settings or is_of_own_code(folder):
        return None
    # These may name code as well.
    kept.pop("processor_class", None)
    own_class = kept.get("tokenizer_class")
    if own_class is None or _is_known(own_class):
        return kept
    if not (folder / _FAST_FILE).is_file() and own_class != _SAME_AS_ITS_MODEL:
        raise ErnieQuantError(
            f"{folder} has a tokenizer of the class {own_class!r}, which only its own code has "
            f"(auto_map in {SETTINGS_FILE}); that is not run, and there is no {_FAST_FILE} to do "
            f"without: save the tokenizer as a {_FAST_FILE} that transformers loads"
        )
    return kept | {"tokenizer_class": _GENERAL_CLASS}


def _is_known(tokenizer_class: Any) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(tokenizer_class, str):
        return False
    return tokenizer_class_from_name(tokenizer_class) is not None


def load_tokenizer(folder: Path, or_else: str = "") -> Any:
    """The tokenizer of a checkpoint folder; ``or_else`` tells what to do when there is none.

    Raises:
        ErnieQuantError: it has none, its files are damaged or name files elsewhere, or only code
            of the checkpoint can make it.
    """
    require_whole_companions(folder)
    if (folder / SETTINGS_FILE).exists():
        _refuse_paths(folder / SETTINGS_FILE)
    advice = f" ({or_else})" if or_else else ""
    with wrap_errors(f"no tokenizer can be loaded from {folder}{advice}"):
        if is_of_own_code(folder):
            from erniequant.data.sentencepiece_tokenizer import sentencepiece_tokenizer

            return sentencepiece_tokenizer(folder)
        replaced = _replaced_settings(folder)
        if not replaced:
            return _stock_tokenizer(folder)
        with TemporaryDirectory() as made:
            for path in companion_files(folder):
                if path.name not in replaced:
                    copy = Path(made) / path.relative_to(folder)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, copy)
            for name, settings in replaced.items():
                write_json(Path(made) / name, settings)
            tokenizer = _stock_tokenizer(Path(made))
        tokenizer.name_or_path = str(folder)
        return tokenizer


def _replaced_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings files that transformers must not see as they are, by name; empty if it may see all.

    It stops at an ``auto_map`` of null, and takes a class of the checkpoint's code for one to run.
    """
    replaced = {}
    if (folder / SETTINGS_FILE).is_file():
        replaced[SETTINGS_FILE] = settings_without_code(folder)
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE)
        replaced[CONFIG_FILE] = None if plain_settings(config) == config else read_config(folder)
    if not any(replaced.values()):
        return {}
    return {name: read_json(folder / name) if settings is None else settings
            for name, settings in replaced.items()}  # fmt: skip


def _stock_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

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
