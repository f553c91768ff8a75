"""How long work tells an observer what it is doing, without knowing who watches.

The library calls these five methods in order: `plan` once, `start` once, `advance` and `message`
while working, `finish` at the end. The command line draws a progress bar from them; tests record
them; the default ignores them.
"""

from typing import Protocol


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
    """Watches nothing; what every `progress=None` stands for."""

    def plan(self, text: str) -> None: ...

    def start(self, total_units: int) -> None: ...

    def advance(self, units: int, label: str) -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self) -> None: ...


NULL_PROGRESS = NullProgress()
