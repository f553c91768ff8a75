"""Text files, compressed or not, read a block at a time; any problem is one line naming the file.

A byte order mark at the beginning is dropped, and every kind of line end becomes a line feed.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from erniequant.checkpoint.pointers import refuse_pointer
from erniequant.errors import ErnieQuantError

BLOCK = 1 << 20
"""Bytes that are read at once."""

LONGEST = 1 << 26
"""Characters of the longest line or record: what is parsed as a whole has to fit into memory."""

MARK = "\ufeff"
"""Byte order mark, which editors on Windows write first."""

_KINDS = {
    ".txt": "text", ".text": "text", ".jsonl": "lines", ".ndjson": "lines",
    ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ACCEPTED = (
    "FILE.txt, .jsonl, .json, .csv, .tsv (each also compressed as .gz, .bz2 or .xz) or .parquet"
)

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(path: Path) -> str | None:
    """``text``, ``lines`` (of JSON), ``json``, ``csv`` or ``parquet``, by the name; None for
    others."""
    packed = path.suffix.lower() in _PACKED
    kind = _KINDS.get(inner_suffix(path))
    return None if packed and kind == "parquet" else kind


def inner_suffix(path: Path) -> str:
    """The suffix in lower case, without that of the compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def is_packed(path: Path) -> bool:
    """True if the file is compressed."""
    return path.suffix.lower() in _PACKED


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed.

    Raises:
        ErnieQuantError: it cannot be read, is not a file, or is damaged.
    """
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device may never end.
            raise ErnieQuantError(f"cannot read {path}: it is not a file; check the path")
        with _PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:
            raise _damaged(path, error) from error
        raise ErnieQuantError(f"cannot read {path}: {error.strerror}; check the path") from error


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, about `BLOCK` characters at a time.

    Raises:
        ErnieQuantError: as `opened`; it is not UTF-8, or a pointer of Git LFS.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    position = 0
    beginning = True
    with opened(path) as file:
        while True:
            data = file.read(BLOCK)
            if not position:
                refuse_other_contents(path, data)
            held = len(decoder.getstate()[0])
            try:
                text = lines.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(path, position - held + error.start) from error
            position += len(data)
            if text:
                yield text.removeprefix(MARK) if beginning else text
                beginning = False
            if not data:
                return


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1, without line ends. Only a line feed ends one: JSON may hold
    other separators.

    Raises:
        ErnieQuantError: as `text_blocks`; a line is longer than `LONGEST`.
    """
    number, length = 1, 0
    parts: list[str] = []
    for block in text_blocks(path):
        first, *others = block.split("\n")
        parts.append(first)
        length += len(first)
        for other in others:
            yield number, "".join(parts)
            number, parts, length = number + 1, [other], len(other)
        if length > LONGEST:
            raise ErnieQuantError(
                f"{path} line {number} has more than {LONGEST} characters: break it into lines"
            )
    if length:
        yield number, "".join(parts)


def refuse_other_contents(path: Path, data: bytes) -> None:
    """Look at the first bytes of a file that should hold text.

    Raises:
        ErnieQuantError: they are those of UTF-16, or of a pointer of Git LFS.
    """
    if data.startswith(_UTF_16):
        raise ErnieQuantError(f"{path} is not UTF-8 but UTF-16: convert it to UTF-8 text")
    refuse_pointer(path, data)


def not_utf8(path: Path, position: int) -> ErnieQuantError:
    return ErnieQuantError(f"{path} is not UTF-8 (byte {position}): convert it to UTF-8 text")


def _damaged(path: Path, error: Exception) -> ErnieQuantError:
    return ErnieQuantError(f"{path} is damaged or cut short ({error}): copy it again")


def read_text(path: Path) -> str:
    """All of a text file.

    Raises:
        ErnieQuantError: as `text_blocks`, or it holds nothing but space.
    """
    text = "".join(text_blocks(path))
    if not text.strip():
        raise no_text(path)
    return text


def no_text(source: object) -> ErnieQuantError:
    return ErnieQuantError(f"{source} holds no text: give a file with words in it")
