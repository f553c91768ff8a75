"""Turns what a command raises into one line on stderr and an exit code.

0 done, 1 refused or failed, 2 usage (Typer's own), 3 done but degraded, 130 interrupted.
`ERNIEQUANT_DEBUG=1` lets the traceback through.
"""

import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand

from erniequant.errors import ErnieQuantError

FAILED = 1
DEGRADED = 3
INTERRUPTED = 130


class GuardedCommand(TyperCommand):
    """A command whose failures reach the user as one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if os.environ.get("ERNIEQUANT_DEBUG") == "1":
                raise
            complain(one_line(error))
            raise typer.Exit(FAILED) from None


def one_line(error: Exception) -> str:
    """What a user reads about `error`: its own words where it was meant for them, its type
    otherwise."""
    text = " ".join(str(error).split())
    if isinstance(error, ErnieQuantError):
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text or 'the work did not fit'}; use a machine with more of it"
    if isinstance(error, OSError):
        return text
    return f"unexpected {type(error).__name__}: {text} (ERNIEQUANT_DEBUG=1 shows the traceback)"


def complain(text: str) -> None:
    """Print one red line on stderr (red on a terminal only)."""
    typer.secho(
        f"erniequant: {text}", fg=typer.colors.RED, err=True, color=sys.stderr.isatty() or None
    )
