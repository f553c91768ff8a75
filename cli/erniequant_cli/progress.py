"""Draws the library's progress events on stderr: a bar with time left on a terminal, plain lines
in a log.

The plan goes to stdout: under `--dry-run` it is the result.
"""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from erniequant.progress import NULL_PROGRESS, NullProgress
from erniequant_cli.terminal import is_drawable, note, printable, say

# In a log, one line a minute shows that the work is alive without burying what matters.
SECONDS_BETWEEN_LOG_LINES = 60.0
# With less room every part of the bar would be cut; label and progress fit in twenty columns.
COLUMNS_OF_A_BAR = 60


class TerminalProgress:
    """The bar: current label, units done, elapsed time and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        narrow = self._console.width < COLUMNS_OF_A_BAR
        # When room is short, the label gives way to the progress.
        label = Column(ratio=1, no_wrap=True) if narrow else None
        what = TextColumn("{task.description}", markup=False, table_column=label)
        count = MofNCompleteColumn()
        time_left = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns = (count, what) if narrow else (what, BarColumn(), count, *time_left)
        self._bar = Progress(*columns, console=self._console, expand=narrow)
        self._task: TaskID | None = None

    def plan(self, text: str) -> None:
        say(text)

    def start(self, total_units: int) -> None:
        self._task = self._bar.add_task("starting", total=total_units or None)
        self._bar.start()

    def advance(self, units: int, label: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, advance=units, description=printable(label))

    def message(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)

    def finish(self) -> None:
        self._bar.stop()


class LogProgress:
    """Plain lines for output that is not a terminal."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._started = self._last = time.monotonic()

    def plan(self, text: str) -> None:
        say(text)

    def start(self, total_units: int) -> None:
        self._total, self._done = total_units, 0
        self._started = self._last = time.monotonic()

    def advance(self, units: int, label: str) -> None:
        self._done += units
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LOG_LINES:
            self._last = now
            left = (now - self._started) / max(self._done, 1) * max(self._total - self._done, 0)
            note(f"{label}: {self._done}/{self._total or '?'}, about {left / 60:.0f} min left")

    def message(self, text: str) -> None:
        note(text)

    def finish(self) -> None: ...


def make_progress(quiet: bool) -> TerminalProgress | LogProgress | NullProgress:
    """The observer that fits the output."""
    if quiet:
        return NULL_PROGRESS
    return TerminalProgress() if is_drawable(sys.stderr) else LogProgress()
