"""Where a chat takes place: a terminal with somebody at it, or a pipe.

At a terminal, Ctrl-C stops an answer and not the program; pressing it again before the next prompt
does nothing. Elsewhere it ends the program, as for every command.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from rich.console import Console

from erniequant_cli.terminal import (
    ask,
    is_conversation,
    is_drawable,
    next_line,
    note,
    printable,
    say,
    say_piece,
)

Show = Callable[[str], None]


class Screen(Protocol):
    """Takes what happens in a chat."""

    is_conversation: bool

    def open(self, model: str) -> Any:
        """A context in which the chat with a model takes place."""

    def next_line(self) -> str | None:
        """The next line of the user, None if there is none."""

    def answering(self) -> Any:
        """A context in which an answer comes; gives a function that takes its pieces. At a
        terminal, Ctrl-C raises KeyboardInterrupt in it once."""

    def note(self, text: str) -> None:
        """Take something worth knowing that is not an answer."""

    def measured(self, answer: Any) -> None:
        """Take the numbers of an `Answer`."""


class Interrupts:
    """Ctrl-C raises KeyboardInterrupt once in a context of `heard`, and does nothing elsewhere."""

    def __init__(self) -> None:
        self._listening = self._pressed = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A context in which this is so, unless it is outside of the main thread, where no signals
        arrive."""
        before = None
        with suppress(ValueError):
            before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """A context that Ctrl-C ends."""
        self._pressed, self._listening = False, True
        try:
            yield
        finally:
            self._listening = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was raised and lost: libraries may catch it."""
        if self._pressed:
            raise KeyboardInterrupt

    def _press(self, number: int, frame: Any) -> None:
        if self._listening:
            self._listening, self._pressed = False, True
            raise KeyboardInterrupt


@contextmanager
def answer_line() -> Iterator[Show]:
    """A context that shows pieces of text and then ends the line, unless it failed before it showed
    any."""
    shown = False

    def show(piece: str) -> None:
        nonlocal shown
        shown = True
        say_piece(piece)

    try:
        yield show
    except BaseException:
        if shown:
            say("")
        raise
    say("")


class Terminal:
    """Somebody types and reads."""

    is_conversation = True

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._interrupts = Interrupts()

    @contextmanager
    def open(self, model: str) -> Iterator[None]:
        with self._interrupts.taken():
            self.note(f"{model}: /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
            yield

    def next_line(self) -> str | None:
        with self._interrupts.heard():
            return ask("> ")

    @contextmanager
    def answering(self) -> Iterator[Show]:
        # A long prompt is read for a while before the first word comes.
        waiting = self._console.status("reading") if is_drawable(sys.stdout) else None
        if waiting is not None:
            waiting.start()

        def done() -> None:
            nonlocal waiting
            if waiting is not None:
                waiting.stop()
                waiting = None

        def show(piece: str) -> None:
            self._interrupts.check()
            done()
            write(piece)

        try:
            with answer_line() as write, self._interrupts.heard():
                yield show
        finally:
            done()

    def note(self, text: str) -> None:
        self._console.print(printable(text), style="dim")

    def measured(self, answer: Any) -> None:
        read = answer.prompt_tokens - answer.reused_tokens
        self.note(f"{answer.tokens} tokens in {answer.seconds:.1f} s, after reading {read}")


class Pipe:
    """Lines come in, answers go out; notes go to stderr."""

    is_conversation = False

    @contextmanager
    def open(self, model: str) -> Iterator[None]:
        yield

    def next_line(self) -> str | None:
        return next_line()

    @contextmanager
    def answering(self) -> Iterator[Show]:
        with answer_line() as show:
            yield show

    def note(self, text: str) -> None:
        note(text)

    def measured(self, answer: Any) -> None: ...


class Silence(Pipe):
    """As `Pipe`, but shows nothing."""

    @contextmanager
    def answering(self) -> Iterator[Show]:
        yield lambda piece: None

    def note(self, text: str) -> None: ...


def make_screen(quiet: bool) -> Screen:
    """The screen that fits stdin and stdout."""
    if quiet:
        return Silence()
    return Terminal() if is_conversation() else Pipe()
