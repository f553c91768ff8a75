"""Token ids of texts of any length, a piece at a time: a tokenizer keeps about 150 bytes per token
of a call.

Pieces end where lines end, and each is tokenised behind the end of the one before, so that the ids
are those of the whole text for every tokenizer that does not look further back.
"""

import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from erniequant.errors import ErnieQuantError, wrap_errors

PIECE = 1 << 18
"""Characters tokenised at once, at least, if there are twice as many."""

BEHIND = 64
"""Characters before a piece that its tokenizer is shown."""

_LINE_END = re.compile(r"\n+(?=[^\n])")
_WORD_END = re.compile(r"\S(?=\s)")


def token_ids(tokenizer: Any, texts: Iterable[str], at_most: int | None = None) -> Tensor:
    """Token ids of texts that follow one another, int64 ``[n]``, without BOS or any other added
    token.

    Args:
        at_most: reading stops at this many tokens.

    Raises:
        ErnieQuantError: the tokenizer cannot read them.
    """
    ids = array("q")
    before = ""
    for piece in pieces(texts, PIECE):
        ids.frombytes(_behind(tokenizer, before, piece).numpy().tobytes())
        before = piece[-BEHIND:]
        if at_most is not None and len(ids) >= at_most:
            break
    if not ids:
        return torch.zeros(0, dtype=torch.int64)
    return torch.frombuffer(ids, dtype=torch.int64)[:at_most]


def pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of ``size`` characters and the rest of a line or a word; at most
    twice as many."""
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > 2 * size:
            end = _cut(held, start + size, start + 2 * size)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _cut(text: str, least: int, most: int) -> int:
    """The end of a line, or else of a word, or else ``least``."""
    for pattern in (_LINE_END, _WORD_END):
        boundary = pattern.search(text, least, most)
        if boundary is not None:
            return boundary.end()
    return least


def _behind(tokenizer: Any, before: str, text: str) -> Tensor:
    """Token ids of a text that follows another. Otherwise, tokenizers that put a space before the
    first word would put one into the middle."""
    if before:
        leading, both = _ids(tokenizer, before), _ids(tokenizer, before + text)
        if torch.equal(both[: len(leading)], leading):
            return both[len(leading) :]
    return _ids(tokenizer, text)


def encoded(text: str) -> bytes:
    """The text in UTF-8.

    Raises:
        ErnieQuantError: it has half of a surrogate pair, which cannot be written.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ErnieQuantError(
            f"the text has half of a surrogate pair at character {error.start}: remove it"
        ) from error


def _ids(tokenizer: Any, text: str) -> Tensor:
    encoded(text)
    with wrap_errors("the tokenizer cannot read the text"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.as_tensor(ids, dtype=torch.int64).reshape(-1)
