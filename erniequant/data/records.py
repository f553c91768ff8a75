"""Records in files (JSON lines, JSON, tables), each with a name for messages.

They are not read by `datasets`, which gives a column of JSON or CSV one type: contents that are a
text in one message and parts in another are refused there, and the text "007" becomes a number. For
Parquet it took 400 MB where 30 MB are enough.
"""

import csv
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from erniequant.checkpoint.strict_json import parse_json
from erniequant.data.documents import is_record
from erniequant.data.files import (
    BLOCK,
    LONGEST,
    MARK,
    inner_suffix,
    kind_of,
    text_blocks,
    text_lines,
)
from erniequant.errors import ErnieQuantError, wrap_errors

ROWS_AT_ONCE = 64
"""Rows of a Parquet file that are in memory together; some hold images."""

_SPACE = re.compile(r"\s*")


def read_records(path: Path) -> Iterator[tuple[Any, str]]:
    """The records of a file, each with its name for messages. A file of unknown kind is read as
    JSONL.

    Raises:
        ErnieQuantError: the file cannot be read, or a record is malformed.
    """
    kind = kind_of(path)
    if kind == "json":
        return _json(path)
    if kind == "csv":
        return _csv(path)
    if kind == "parquet":
        return _parquet(path)
    return _lines(path)


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in text_lines(path):
        # Concatenated files have a byte order mark where each begins.
        line = line.removeprefix(MARK)
        if line.strip():
            where = f"{path} line {number}"
            yield _parsed(line, where), where


def _json(path: Path) -> Iterator[tuple[Any, str]]:
    """The members of a list, the records of an object that wraps one list of records, or values
    that follow one another."""
    values = _Values(path)
    if values.next_is("["):
        values.skip()
        for number, value in enumerate(values.members(), start=1):
            yield value, f"{path} record {number}"
        return
    number = 0
    while not values.at_end():
        number += 1
        value = values.take(f"{path} record {number}")
        inner = _inner_list(value) if number == 1 and values.at_end() else None
        if inner is None:
            yield value, f"{path} record {number}"
        else:
            yield from ((v, f"{path} record {n}") for n, v in enumerate(inner, start=1))


def _inner_list(value: Any) -> list[Any] | None:
    """The records of an object that is a wrapper around them, and no record itself."""
    if not isinstance(value, dict) or is_record(value):
        return None
    lists = [entry for entry in value.values() if isinstance(entry, list) and entry]
    return lists[0] if len(lists) == 1 and all(isinstance(e, dict) for e in lists[0]) else None


class _Values:
    """JSON values that follow one another in a file, parsed as they are read."""

    def __init__(self, path: Path):
        self._path = path
        self._blocks = text_blocks(path)
        self._text = ""
        self._at = 0
        self._ended = False

    def next_is(self, character: str) -> bool:
        return not self.at_end() and self._text[self._at] == character

    def skip(self) -> None:
        """Skip the next character."""
        self._at += 1

    def at_end(self) -> bool:
        """True if only white space follows; skips it."""
        while True:
            gap = _SPACE.match(self._text, self._at)
            assert gap is not None
            self._at = gap.end()
            if self._at < len(self._text):
                return False
            if not self._more(1):
                return True

    def members(self) -> Iterator[Any]:
        """Values up to the end of the list that has begun.

        Raises:
            ErnieQuantError: it neither continues nor ends like a list.
        """
        number = 0
        while not self.next_is("]"):
            if number:
                if not self.next_is(","):
                    raise ErnieQuantError(
                        f"{self._path} is not JSON: neither , nor ] after record {number}"
                    )
                self.skip()
            number += 1
            yield self.take(f"{self._path} record {number}")
        self.skip()
        if not self.at_end():
            raise ErnieQuantError(f"{self._path} is not JSON: more text after the list")

    def take(self, where: str) -> Any:
        """The next value.

        Raises:
            ErnieQuantError: there is none.
        """
        decoder = json.JSONDecoder()
        while not self.at_end():
            try:
                _, end = decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # It may be cut off; twice as much is looked at, so that the work stays linear.
                held = len(self._text) - self._at
                if held > LONGEST:
                    raise ErnieQuantError(
                        f"{where} is not JSON, or longer than {LONGEST} characters ({error}): "
                        "write one record a line (.jsonl)"
                    ) from error
                if not self._more(held):
                    raise ErnieQuantError(f"{where} is not JSON: {error}") from error
                continue
            # A number may go on in the next block.
            if end == len(self._text) and self._more(1):
                continue
            text, self._at = self._text[self._at : end], end
            return _parsed(text, where)
        raise ErnieQuantError(f"{where} is not JSON: the file ends before it")

    def _more(self, characters: int) -> bool:
        """Read at least this many more characters; False at the end of the file."""
        parts = [self._text[self._at :]]
        read = 0
        while read < characters and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            parts.append(block or "")
            read += len(parts[-1])
        self._text, self._at = "".join(parts), 0
        return read > 0


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text.encode("utf-8"))
    except ValueError as error:
        raise ErnieQuantError(f"{where} is not JSON: {error}") from error


def _csv(path: Path) -> Iterator[tuple[Any, str]]:
    # The module refuses cells of more than 131072 characters, which is one chapter.
    csv.field_size_limit(LONGEST)
    lines = (f"{line}\n" for _, line in text_lines(path))
    header = next(lines, "")
    rows = csv.reader(chain([header], lines), delimiter=_delimiter(path, header))
    try:
        names = [name.strip() for name in next(rows, [])]
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if len(row) > len(names):
                raise ErnieQuantError(
                    f"{where} has {len(row)} cells, but the first line names {len(names)}: put "
                    "texts with separators into quotes"
                )
            # After the first line, a row without cells is a blank line.
            if row:
                yield dict(zip(names, row, strict=False)), where
    except csv.Error as error:
        raise ErnieQuantError(f"{path} line {rows.line_num} is not CSV: {error}") from error


def _delimiter(path: Path, header: str) -> str:
    if inner_suffix(path) == ".tsv":
        return "\t"
    # Spreadsheets write semicolons where numbers have commas.
    return ";" if ";" in header and "," not in header else ","


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    if not path.is_file():
        raise ErnieQuantError(f"cannot read {path}: there is no such file; check the path")
    import pyarrow.parquet

    number = 0
    with wrap_errors(f"cannot read {path}"):
        # Without these two, a whole group of rows is in memory.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False)
        for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path} row {number}"
