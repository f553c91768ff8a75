"""Turns what a command raises into one line on stderr and an exit code.

0 done, 1 refused or failed, 2 usage (Typer's own), 3 done but degraded, 130 interrupted. A reader
that closes the pipe changes none of these; stdout that fails otherwise makes 0 a 1, with a line
that says so. `ERNIEQUANT_DEBUG=1` lets the traceback through.
"""

import os
import warnings
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from erniequant.errors import ErnieQuantError, ErnieQuantWarning, one_printable_line
from erniequant_cli.terminal import any_terminal, printable

FAILED = 1
DEGRADED = 3
INTERRUPTED = 130


class GuardedCommand(TyperCommand):
    """A command whose failures reach the user as one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                _show_warnings(quiet=bool(ctx.params.get("quiet")))
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if debugging():
                raise
            complain(one_line(error))
            raise typer.Exit(FAILED) from None


class GuardedCommands(TyperGroup):
    """All commands, on whatever stdout and stderr there are."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with any_terminal() as lost:
            try:
                return super().main(*arguments, **options)
            except SystemExit as end:
                if (reason := lost()) is None:
                    raise
                done = end.code in (0, None, DEGRADED)
                complain(f"cannot print: {reason}" + "; everything else is done" * done)
                raise SystemExit(end.code or FAILED) from None


def debugging() -> bool:
    """True if tracebacks are wanted."""
    return os.environ.get("ERNIEQUANT_DEBUG") == "1"


def one_line(error: Exception) -> str:
    """The line that a user reads about `error`: its own words if it was written for users,
    otherwise its type too."""
    text = one_printable_line(" ".join(str(error).split()))
    if isinstance(error, ErnieQuantError):
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text or 'the work did not fit'}; use a machine with more memory"
    if isinstance(error, OSError):
        return text
    return f"unexpected {type(error).__name__}: {text} (ERNIEQUANT_DEBUG=1 shows the traceback)"


def complain(text: str) -> None:
    """Print one red line on stderr (red on a terminal only)."""
    _line(f"erniequant: {text}", "red")


def _show_warnings(quiet: bool) -> None:
    """Let the library's warnings be one line each, or none; those of others stay as they are."""
    others = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, ErnieQuantWarning):
            others(message, category, *where, **more)
        elif not quiet:
            _line(f"erniequant: warning: {message}", "yellow")

    warnings.showwarning = show
    warnings.simplefilter("always", ErnieQuantWarning)


def _line(text: str, colour: str) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(printable(text), style=colour)
