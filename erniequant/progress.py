"""Progress events: long work tells an observer what it is doing, without knowing who watches.

The library calls these five methods in order: `plan` once, `start` once, `advance` and `message`
while working, `finish` at the end. The command line draws a progress bar from them; tests record
them; the default ignores them.
"""

import warnings
from typing import Any, Protocol

from erniequant.errors import ErnieQuantWarning


class Progress(Protocol):
    """Observer of one piece of work measured in equal units (for quantisation: expert matrices)."""

    def plan(self, text: str) -> None:
        """Receive what is about to be done, as plain text of one or more lines."""

    def start(self, total_units: int) -> None:
        """Begin work of `total_units` units; 0 where the amount is unknown."""

    def advance(self, units: int, label: str) -> None:
        """Count `units` as done; `label` says what is under way ("layer 3 expert 17")."""

    def message(self, text: str) -> None:
        """Receive one line worth keeping on screen, such as a fallback or a finished layer."""

    def finish(self) -> None:
        """End the work; called on success and on failure alike."""


class NullProgress:
    """Watches nothing; every `progress=None` stands for it."""

    def plan(self, text: str) -> None: ...

    def start(self, total_units: int) -> None: ...

    def advance(self, units: int, label: str) -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self) -> None: ...


NULL_PROGRESS = NullProgress()


class _Tolerant:
    """Passes on what happens until the observer cannot print any more.

    OSError and ValueError (UnicodeError among them) are what a stream raises that is full, closed
    or of another encoding, and no reason to lose hours of work. Anything else passes: raising from
    an observer is a way to stop.
    """

    def __init__(self, watched: Progress) -> None:
        self._watched = watched

    def plan(self, text: str) -> None:
        self._pass("plan", text)

    def start(self, total_units: int) -> None:
        self._pass("start", total_units)

    def advance(self, units: int, label: str) -> None:
        self._pass("advance", units, label)

    def message(self, text: str) -> None:
        self._pass("message", text)

    def finish(self) -> None:
        self._pass("finish")

    def _pass(self, event: str, *content: Any) -> None:
        try:
            getattr(self._watched, event)(*content)
        except (OSError, ValueError) as error:
            self._watched = NULL_PROGRESS
            warnings.warn(
                f"the work goes on unobserved: progress.{event} failed: {error}",
                ErnieQuantWarning,
                stacklevel=3,
            )


def observed(progress: Progress | None) -> Progress:
    """The observer to work with for a `progress=` argument: one that cannot stop the work because
    its output fails."""
    return NULL_PROGRESS if progress is None else _Tolerant(progress)
