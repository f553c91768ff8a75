"""The errors and warnings a user may see. Each is one line: what is wrong, where, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 2000
# Rust libraries raise this when they crash; it is no Exception, and its class cannot be imported.
_PANIC = "PanicException"


class ErnieQuantError(Exception):
    """A refusal or failure with a one-line reason; the command line prints it and exits with 1.

    The text is made one printable line: names in damaged files may hold anything.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_printable_line(message))


class ErnieQuantWarning(UserWarning):
    """Something unexpected that does not stop the work; the command line prints it as one line."""


@contextmanager
def wrap_errors(what: str) -> Iterator[None]:
    """Wrap a call of another library: whatever it raises becomes ``what``, and the reason.

    Libraries raise any type at all on damaged files. Errors of our own pass.
    """
    try:
        yield
    except ErnieQuantError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        text = str(error).strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ErnieQuantError(f"{what}: {reason}") from error


def one_printable_line(text: str) -> str:
    """`text` without line breaks and control characters, cut at 2,000 characters."""
    line = " ".join(text.splitlines())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
