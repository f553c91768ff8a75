"""The windows of a text and the tokens scored in each: the protocol behind every perplexity
figure."""

from collections.abc import Iterator
from dataclasses import dataclass

from erniequant.errors import ErnieQuantError


@dataclass(frozen=True)
class Window:
    """Tokens `begin:end` go through the model together; those from `first_scored` on are scored."""

    begin: int
    end: int
    first_scored: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def scored(self) -> int:
        return self.end - self.first_scored


def cut_windows(n_tokens: int, context: int, stride: int) -> list[Window]:
    """Cut `n_tokens` tokens into windows of `context` that start every `stride` tokens.

    Each token is scored at most once, in the first window that can predict it; the first token of a
    window has nothing before it and is never scored there. With stride = context the windows do not
    overlap. The last window may be shorter; one with nothing to score is left out.

    Raises ErnieQuantError when nothing could be scored or the stride would leave tokens out.
    """
    if context < 2:
        raise ErnieQuantError(f"context {context} scores no token: use a context of 2 or more")
    if not 1 <= stride <= context:
        raise ErnieQuantError(
            f"stride {stride} does not fit context {context}: use a stride from 1 to the context"
        )
    if n_tokens < 2:
        raise ErnieQuantError(
            f"the text has {n_tokens} token(s), nothing can be scored: use a longer text"
        )
    windows = []
    already_scored = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + context, n_tokens)
        window = Window(begin, end, max(already_scored, begin + 1))
        if window.scored > 0:
            windows.append(window)
        already_scored = end
        if end == n_tokens:
            break
    return windows


def group_windows(windows: list[Window], tokens_per_pass: int) -> Iterator[list[Window]]:
    """Yield runs of windows of one length that fill up to `tokens_per_pass` tokens together."""
    group: list[Window] = []
    for window in windows:
        fits = (len(group) + 1) * window.length <= tokens_per_pass
        if group and (window.length != group[0].length or not fits):
            yield group
            group = []
        group.append(window)
    if group:
        yield group
