"""Files of a checkpoint's folder that go with its weights into a result. Everything else stays
behind and is named: other tools leave files that change how the folder loads."""

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from erniequant.checkpoint.config import CONFIG_FILE
from erniequant.checkpoint.pointers import refuse_pointer
from erniequant.errors import ErnieQuantError

COMPANIONS = (
    # Tokenizers.
    "tokenizer.json", "tokenizer.*.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken",
    # Chat templates, generation, processors of images and videos.
    "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
"""Names of the files that are copied, beside licences."""

LICENCES = ("license*", "licence*", "notice*", "copying*")
"""Names of licence files that are copied, in upper or lower case."""

REPORT_FILE = "quantization_report.json"
"""The report of `erniequant.quantize`; it belongs to the weights beside it and is never copied."""

TEMPLATES_FOLDER = "additional_chat_templates"
_SHOWN = 8


def companion_files(folder: Path) -> list[Path]:
    """The files of a folder on the list, sorted.

    Raises:
        ErnieQuantError: the folder cannot be read, or one of them is a link to nothing.
    """
    try:
        companions = [path for path in sorted(folder.iterdir()) if _is_companion(path)]
        templates = folder / TEMPLATES_FOLDER
        if templates.is_dir():
            companions += [path for path in sorted(templates.glob("*.jinja")) if path.is_file()]
    except OSError as error:
        raise ErnieQuantError(f"{folder} cannot be read: {error.strerror}") from error
    return companions


def require_whole_companions(folder: Path) -> None:
    """Refuse companion files that are not there although they seem to be.

    Raises:
        ErnieQuantError: one is a Git LFS pointer or a link to nothing.
    """
    for path in companion_files(folder):
        refuse_pointer(path)


def left_behind(folder: Path, used: Collection[str]) -> tuple[str, ...]:
    """Names of everything else in a folder, sorted; those of folders end in a slash.

    used: names of the files that hold the weights, the index among them.
    """
    taken = {CONFIG_FILE, *used, *(path.name for path in companion_files(folder))}
    left = [p for p in folder.iterdir() if p.name not in taken and p.name != TEMPLATES_FOLDER]
    return tuple(sorted(_printable(path.name) + "/" * path.is_dir() for path in left))


def describe_left_behind(names: Collection[str]) -> str:
    """One line that names them, the first ones if they are many; empty for none."""
    if not names:
        return ""
    shown = ", ".join(list(names)[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"left behind ({len(names)}): {shown}{more}"


def require_apart(source: Path, destination: Path) -> None:
    """Refuse to write into the folder that is read, or below it.

    Raises:
        ErnieQuantError: the destination is there.
    """
    above, below = source.resolve(), destination.resolve()
    if above == below:
        raise ErnieQuantError(f"{destination} is the source itself; give a new folder")
    if above in below.parents:
        raise ErnieQuantError(
            f"{destination} is inside the source {source}; give a folder outside of it"
        )


def _is_companion(path: Path) -> bool:
    listed = any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
    if not listed and not any(fnmatchcase(path.name.lower(), pattern) for pattern in LICENCES):
        return False
    if path.is_symlink() and not path.exists():
        raise ErnieQuantError(
            f"{path} is a link to {path.readlink()}, which is not there; complete the download "
            "or copy"
        )
    return path.is_file()


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
