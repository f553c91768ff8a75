"""What goes with the weights of a quantised checkpoint, without the code that some sources need for
it: transformers alone has to be able to load the result."""

from pathlib import Path

from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.reader import read_json
from erniequant.checkpoint.writer import companion_files, copy_companion
from erniequant.tokenizers import is_of_own_code, load_tokenizer, write_tokenizer

# Replaced by what transformers writes for the same tokenizer.
_OF_TOKENIZER = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                 "chat_template.jinja")  # fmt: skip
_OF_PROCESSOR = ("preprocessor_config.json", "processor_config.json",
                 "video_preprocessor_config.json")  # fmt: skip
_CLASSES = ("image_processor_type", "processor_class", "video_processor_type")
_KNOWN_CLASSES = "Ernie4_5_VLMoe"
"""What the names of transformers' own classes for these models begin with."""


def require_companions(source: Path) -> None:
    """Refuse at once what `write_companions` would refuse after hours of work.

    Raises:
        ErnieQuantError: the tokenizer cannot be made.
    """
    if is_of_own_code(source):
        load_tokenizer(source)


def write_companions(source: Path, destination: Path) -> None:
    """Copy `companion_files`; of those that name code of the checkpoint, write what does without.

    Raises:
        ErnieQuantError: the tokenizer cannot be made, or the disk refuses.
    """
    made_anew = is_of_own_code(source)
    for path in companion_files(source):
        if path.name in _OF_PROCESSOR and "auto_map" in (settings := read_json(path)):
            write_json(destination / path.name, _without_code(settings))
        elif not (made_anew and path.name in _OF_TOKENIZER):
            copy_companion(path, source, destination)
    if made_anew:
        write_tokenizer(load_tokenizer(source), destination)


def _without_code(settings: dict[str, object]) -> dict[str, object]:
    return {
        key: value
        for key, value in settings.items()
        if key != "auto_map" and not (key in _CLASSES and not str(value).startswith(_KNOWN_CLASSES))
    }
