"""Files that go with the weights of a checkpoint, freed of the code that some sources need:
transformers alone must be able to load the result."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from erniequant.checkpoint.config import CODE_ENTRIES, plain_settings, read_json
from erniequant.checkpoint.files import disk_error, write_file, write_json
from erniequant.checkpoint.folder import companion_files, require_whole_companions
from erniequant.data.tokenizers import (
    SETTINGS_FILE,
    has_tokenizer,
    is_of_own_code,
    load_tokenizer,
    settings_without_code,
    write_tokenizer,
)
from erniequant.errors import wrap_errors

# Replaced by what transformers writes for the same tokenizer.
_OF_TOKENIZER = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                 "chat_template.jinja")  # fmt: skip
_OF_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json",
                 "video_preprocessor_config.json")  # fmt: skip
_GENERATION = "generation_config.json"
_CLASSES = ("image_processor_type", "feature_extractor_type", "processor_class",
            "video_processor_type")  # fmt: skip


def require_readable_companions(source: Path) -> None:
    """Refuse at once files that `write_companions` would stop at.

    Raises:
        ErnieQuantError: one is damaged, a Git LFS pointer or a link to nothing.
    """
    require_whole_companions(source)
    for path in companion_files(source):
        _rewritten(path)


def require_companions(source: Path) -> int:
    """Refuse at once anything that would make the result of hours unusable.

    Returns:
        The number of tokens that the tokenizer has, 0 without one.

    Raises:
        ErnieQuantError: as `require_readable_companions`, the settings of generation are not
            valid, or the tokenizer cannot be made without code of the checkpoint.
    """
    require_readable_companions(source)
    path = source / _GENERATION
    if path.is_file():
        from transformers import GenerationConfig

        # Loading the result would raise the same error.
        with wrap_errors(f"transformers refuses {path}"):
            GenerationConfig.from_dict(plain_settings(read_json(path)))
    return len(load_tokenizer(source)) if has_tokenizer(source) else 0


def write_companions(source: Path, destination: Path) -> None:
    """Copy `companion_files`; files that name code of the checkpoint are rewritten to do without
    it.

    Raises:
        ErnieQuantError: a file is damaged, the tokenizer cannot be made, or the disk refuses.
    """
    made_anew = is_of_own_code(source)
    for path in companion_files(source):
        if made_anew and path.name in _OF_TOKENIZER:
            continue
        settings = _rewritten(path)
        if settings is None:
            _copy(path, destination / path.relative_to(source))
        else:
            write_json(destination / path.name, settings)
    if made_anew:
        write_tokenizer(load_tokenizer(source), destination)


def _rewritten(path: Path) -> dict[str, Any] | None:
    """The replacement for a file that names code; None for all others."""
    if path.name == SETTINGS_FILE:
        return settings_without_code(path.parent)
    if path.name not in (*_OF_PROCESSOR, _GENERATION):
        return None
    settings = read_json(path)
    return _without_classes(plain_settings(settings)) if _names_code(settings) else None


def _names_code(settings: Any) -> bool:
    if isinstance(settings, dict):
        return any(k in CODE_ENTRIES or _names_code(v) for k, v in settings.items())
    return isinstance(settings, list) and any(map(_names_code, settings))


def _without_classes(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without names of classes that only the code has, also in nested processors."""
    from erniequant.models.registry import FAMILIES

    prefixes = tuple(filter(None, (family.processor_classes for family in FAMILIES.values())))
    return {
        key: _without_classes(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not (key in _CLASSES and not str(value).startswith(prefixes))
    }


def _copy(path: Path, target: Path) -> None:
    try:
        target.parent.mkdir(exist_ok=True)
        with path.open("rb") as original:
            write_file(target, partial(shutil.copyfileobj, original))
    except OSError as error:
        raise disk_error(target, error) from error
