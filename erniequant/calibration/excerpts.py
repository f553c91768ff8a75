"""Excerpts of a large text, spread over all of it. Windows are chosen at random, so more text than
they are chosen from need not be read, and the beginning alone does not represent the rest."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from erniequant.data.files import (
    BLOCK,
    MARK,
    is_packed,
    not_utf8,
    opened,
    refuse_other_contents,
    text_blocks,
)

WHOLE = 1 << 22
"""Bytes up to which a text is read from end to end."""

EXCERPT = 1 << 18
"""Bytes of an excerpt, before it is cut to whole lines."""

_LEAST_TOKENS = EXCERPT // 32
"""Tokens that an excerpt is taken to have at least, since the first may be blank."""


def text_excerpts(
    path: Path, wanted: int, seed: int, count_tokens: Callable[[str], int]
) -> Iterator[Iterable[str]]:
    """The text of a file as one document; of a large file, random excerpts from all over it, in
    order, that hold ``wanted`` tokens and at least about `WHOLE` bytes.

    Args:
        count_tokens: counts the tokens of a text; the first excerpt stands for all.

    Raises:
        ErnieQuantError: the file cannot be read, or what is read is not UTF-8.
    """
    size = _size(path)
    if size <= WHOLE:
        yield text_blocks(path)
        return
    per_excerpt = max(count_tokens(next(_read(path, [0]))), _LEAST_TOKENS)
    needed = max(-(-wanted // per_excerpt), WHOLE // EXCERPT)
    there = size // EXCERPT  # what is left over at the end is never chosen
    if needed >= there:
        yield text_blocks(path)
        return
    generator = torch.Generator().manual_seed(seed)
    # One at random in each of as many equal parts of the file.
    places = torch.arange(needed) + torch.rand(needed, generator=generator, dtype=torch.float64)
    chosen = (places * (there / needed)).long().clamp(max=there - 1).unique()
    for text in _read(path, chosen.tolist()):
        yield [text]


def _size(path: Path) -> int:
    """Bytes of the text; a compressed file has to be decompressed to tell."""
    with opened(path) as file:
        if not is_packed(path):
            return path.stat().st_size
        return sum(map(len, iter(lambda: file.read(BLOCK), b"")))


def _read(path: Path, numbers: Iterable[int]) -> Iterator[str]:
    """The excerpts with these numbers, ascending."""
    with opened(path) as file:
        for number in numbers:
            file.seek(number * EXCERPT)
            data = file.read(EXCERPT)
            if not number:
                refuse_other_contents(path, data)
            yield _lines(data, number, path)


def _lines(data: bytes, number: int, path: Path) -> str:
    """The whole lines of an excerpt; where there is no line end, its whole characters."""
    start = data.find(b"\n") + 1 if number else 0
    end = data.rfind(b"\n") + 1
    data, offset = (data[start:end], start) if end > start else (data, 0)
    # Up to three bytes of a character that began before.
    cut = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0) if number else 0
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[cut:])
    except UnicodeDecodeError as error:
        raise not_utf8(path, number * EXCERPT + offset + cut + error.start) from error
    return text.removeprefix(MARK).replace("\r\n", "\n").replace("\r", "\n")
