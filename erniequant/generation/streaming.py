"""The text of an answer while its tokens come.

A token is not a piece of text: a character may need several of them, and a tokenizer may write a
token differently after another. Text is therefore shown once later tokens cannot change it, and
all pieces together are what the tokenizer makes of all tokens at once.
"""

import re
from collections.abc import Callable
from typing import Any

OnText = Callable[[str], None]
"""Takes the next piece of an answer; never an empty one."""

_WINDOW = 64
"""Tokens decoded again with every new one, so that a long answer does not cost its square."""
_CONTEXT = 8
"""Tokens that stay when the window moves on; the first ones of a text are written differently."""
_UNFINISHED = "\ufffd"
"""Stands for bytes that are not a character yet."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CLEANED = 8
"""Characters at the end that tokenizers may take away when they clean up spaces; their longest
pattern has four."""


class TextStream:
    """Turns tokens into pieces of text, one token at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._held = _CLEANED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._in_bytes = False
        self._start = 0  # of the window, in tokens
        self._shown = 0  # characters of the window's text
        self.ids: list[int] = []
        self.text = ""
        """All that was shown."""

    def push(self, token: int) -> str:
        """The text that this token makes final; may be empty."""
        self.ids.append(token)
        if token not in self._special:  # which are left out before bytes are put together
            self._in_bytes = self._is_byte(token)
        if self._in_bytes:
            return ""  # bytes are valid, or not, together with those that follow
        window = self._decode(self.ids[self._start :])
        final = window.rstrip(_UNFINISHED)
        final = final[: max(len(final) - self._held, 0)]
        piece = final[self._shown :]
        self._shown += len(piece)
        self.text += piece
        if len(self.ids) - self._start >= _WINDOW:
            self._move(window)
        return piece

    def finish(self, text: str) -> str:
        """The rest, given the text of all tokens."""
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _move(self, window: str) -> None:
        """Let the window begin later, where the texts before and after agree."""
        start = len(self.ids) - _CONTEXT
        rest = self._decode(self.ids[start:])
        waiting = len(window) - self._shown
        first = self.ids[start]
        whole = first not in self._special and not self._is_byte(first) and _UNFINISHED not in rest
        if whole and window.endswith(rest) and len(rest) > waiting:
            self._start, self._shown = start, len(rest) - waiting

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE.fullmatch(name) is not None


class TokenStreamer:
    """Takes tokens from transformers as they are chosen, and passes their text on."""

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        self._stream = TextStream(tokenizer)
        self._on_text = on_text
        self._sees_prompt = True

    @property
    def ids(self) -> list[int]:
        """Tokens of the answer so far."""
        return self._stream.ids

    @property
    def text(self) -> str:
        """Text that was passed on so far."""
        return self._stream.text

    def put(self, tokens: Any) -> None:
        """Called by transformers: with the prompt first, then with every token."""
        if self._sees_prompt:
            self._sees_prompt = False
            return
        for token in tokens.flatten().tolist():
            self._pass(self._stream.push(token))

    def end(self) -> None:
        """Called by transformers after the last token."""

    def finish(self, text: str) -> None:
        """Pass on what is left of the whole text."""
        self._pass(self._stream.finish(text))

    def _pass(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(piece)
