"""The documents of a calibration source: texts, rendered chats, records with images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniequant.calibration.config import CalibrationConfig
from erniequant.calibration.excerpts import text_excerpts
from erniequant.data.documents import texts_and_chats
from erniequant.data.files import ACCEPTED, kind_of
from erniequant.data.given import FILES, Given, members, records_of
from erniequant.data.image_records import has_images
from erniequant.data.records import read_records
from erniequant.data.templates import render
from erniequant.data.tokens import token_ids
from erniequant.errors import ErnieQuantError
from erniequant.paths import expanded

Record = tuple[Any, str]
"""A record, and how to name it in messages."""


@dataclass(frozen=True)
class ImageDocument:
    """A record with images, not read yet; paths in it are relative to ``folder``."""

    record: Any
    where: str
    folder: Path


@dataclass(frozen=True)
class EmptyRow:
    """A record without a word in it."""


Document = Iterable[str] | ImageDocument | EmptyRow
"""A text is an iterable of its parts."""


def documents(
    config: CalibrationConfig, tokenizer: Any, images: bool = False
) -> Iterator[Document]:
    """The documents of a source, chats rendered; ``images``: built-in ones too.

    Raises:
        ErnieQuantError: the source cannot be read, or a record has an unknown form.
    """
    source = config.source
    if source == "builtin":
        from erniequant_data import calibration_images, calibration_text

        if images:
            path = calibration_images()
            for record, where in read_records(path):
                yield ImageDocument(record, where, path.parent)
        yield [calibration_text()]
    elif source.startswith("hf:"):
        yield from _of_records(_dataset(source), config, tokenizer, Path())
    else:
        yield from _of_file(source_file(source), config, tokenizer)


def given_documents(
    data: Given, kind: str, config: CalibrationConfig, tokenizer: Any
) -> Iterator[Document]:
    """The documents of Python objects; a path stands for the documents of its file.

    Raises:
        ErnieQuantError: as `documents`, or an object is of another kind.
    """
    if kind != FILES:
        yield from _of_records(records_of(data, kind), config, tokenizer, Path())
        return
    for path, _ in members(data, FILES):
        yield from _of_file(source_file(str(path)), config, tokenizer)


def _of_file(path: Path, config: CalibrationConfig, tokenizer: Any) -> Iterator[Document]:
    if kind_of(path) == "text":
        yield from text_excerpts(path, config.wanted, config.seed, _counter(tokenizer))
    else:
        yield from _of_records(read_records(path), config, tokenizer, path.parent)


def source_file(source: str) -> Path:
    """The path of a source that is a file.

    Raises:
        ErnieQuantError: it is not a file that can be calibrated on.
    """
    path = expanded(source)
    if kind_of(path) is not None:
        return path
    if len(source) < 4096 and "\0" not in source and path.is_dir():
        raise ErnieQuantError(
            f"calibration source {source} is a folder; name a file in it, or give hf:{source}"
        )
    shown = source if len(source) <= 80 else f"{source[:80]}…"
    raise ErnieQuantError(
        f"calibration source {shown!r} is not one of builtin, {ACCEPTED}, hf:NAME[:SPLIT[:COLUMN]]"
    )


def _counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: token_ids(tokenizer, [text]).numel()


def _of_records(
    records: Iterable[Record], config: CalibrationConfig, tokenizer: Any, folder: Path
) -> Iterator[Document]:
    for record, where in records:
        if has_images(record):
            yield ImageDocument(record, where, folder)
            continue
        entries = texts_and_chats(record, where)
        if not entries:
            yield EmptyRow()
        for entry in entries:
            if isinstance(entry, str):
                yield [entry]
            else:
                yield [render(entry, tokenizer, config.chat_template, where)]


def _dataset(source: str) -> Iterator[Record]:
    """Rows of a Hugging Face data set; a column that is asked for is a text or a chat."""
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    if name.startswith("~"):
        name = str(expanded(name))
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the data set library raises many unrelated types
        reason = " ".join(str(error).split())
        raise ErnieQuantError(f"cannot load data set {name}: {reason}") from error
    for number, row in enumerate(rows):
        where = f"data set {name} row {number}"
        if column and column not in row:
            raise ErnieQuantError(
                f"data set {name} has no column {column!r} but {', '.join(row)}: name one as "
                "hf:NAME:SPLIT:COLUMN"
            )
        yield (_by_column(row, column) if column else row), where


def _by_column(row: dict[str, Any], column: str) -> dict[str, Any]:
    value = row[column]
    is_chat = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    if is_chat:
        return {**row, "text": None, "messages": value}
    return {**row, "text": "" if value is None else value}
