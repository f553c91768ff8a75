"""The output of every command: to any encoding, width and kind of terminal, and to none.

A character that the stream cannot hold is written in others. A stream that fails (a reader that
went away, a full disk) is written no further and never stops the work: `Output` remembers why, and
the end of the command says so. Nothing else in this package calls `print` or `typer.echo`.
"""

import errno
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

READABLE = {
    **{
        "±": "+-",
        "×": "x",
        "…": "...",
        "·": ".",
        "•": "*",
        "→": "->",
        "≤": "<=",
        "≥": ">=",
        "ᵀ": "'",
    },
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "\u00a0": " "},
}
"""For characters that the commands print themselves; others become escapes, such as `\\u4f60`."""

# Handlers that a user has to ask for, in PYTHONIOENCODING; none of them ever raises.
_CHOSEN = ("ignore", "replace", "xmlcharrefreplace", "namereplace")
_GONE = (errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET)


class Output:
    """A text stream that takes any text and never raises; all else is passed on to the stream."""

    def __init__(self, stream: Any, broken: Exception | None = None) -> None:
        self._stream, self._broken = stream, broken
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write what the stream can hold of `text`."""
        if getattr(self._stream, "errors", None) not in _CHOSEN:
            text = encodable(text, self._stream)
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, as far as the stream still works."""
        if self._broken is None:
            self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], Any]) -> None:
        if self._broken is None:
            try:
                act()
            except (OSError, ValueError) as error:
                self._broken = error
                self._forget()
        # A stream that was closed from the start loses nothing until something is written.
        self.failure = self._broken

    def _forget(self) -> None:
        """Let what is still buffered go nowhere: Python would try it again when it ends."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError, AttributeError):
            pass  # no file behind it, so nothing is buffered


def encodable(text: str, stream: Any) -> str:
    """`text` in characters that `stream` can encode: readable ones where known, else escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"

    def fits(part: str) -> bool:
        try:
            part.encode(encoding)
        except UnicodeEncodeError:
            return False
        return True

    return text if fits(text) else "".join(c if fits(c) else _plain(c) for c in text)


def _plain(character: str) -> str:
    if character in READABLE:
        return READABLE[character]
    # Superscripts and full-width letters have a plain one.
    alike = unicodedata.normalize("NFKC", character)
    return alike if alike.isascii() else character.encode("ascii", "backslashreplace").decode()


def printable(text: str) -> str:
    """`text` without characters that move the cursor or change a terminal, except tab and newline:
    models and names in files may hold any of them."""
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
        else c
        for c in text
    )


def say(text: str) -> None:
    """Print on stdout."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def say_piece(text: str) -> None:
    """Print a piece of a line on stdout, at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def note(text: str) -> None:
    """Print on stderr."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def typed(text: str) -> str:
    """An argument as it was typed: in an ASCII-only locale, Python reads its UTF-8 as undecodable
    bytes. Bytes that are not UTF-8 either stay as they are."""
    if not any("\udc80" <= c <= "\udcff" for c in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def is_conversation() -> bool:
    """True if there is somebody to talk to: stdin and stdout are a terminal's."""
    return sys.stdin is not None and sys.stdin.isatty() and bool(sys.stdout.isatty())


def ask(prompt: str) -> str | None:
    """A line that is typed at a terminal, with the keys and the memory of readline; None at its
    end, or for Ctrl-C on an empty line. Ctrl-C on another one throws it away.
    """
    try:
        import readline
    except ImportError:  # not on every system
        readline = None  # type: ignore[assignment]
    _take_any_bytes()
    try:
        return typed(input(prompt))
    except KeyboardInterrupt:
        say("")
        return "" if readline is not None and readline.get_line_buffer() else None
    except (EOFError, OSError):  # the terminal may be gone
        say("")
        return None


def next_line() -> str | None:
    """The next line of stdin, None at its end."""
    if sys.stdin is None:
        return None
    _take_any_bytes()
    line = sys.stdin.readline()
    return typed(line.removesuffix("\n")) if line else None


def _take_any_bytes() -> None:
    """Let bytes that are no text be read: whoever takes the line says what is wrong with it."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None and getattr(sys.stdin, "errors", "") == "strict":
        reconfigure(errors="surrogateescape")


def is_drawable(stream: Any) -> bool:
    """True if a bar can move on `stream`: a terminal, and not a dumb one."""
    return bool(stream.isatty()) and os.environ.get("TERM", "") not in ("dumb", "unknown")


@contextmanager
def any_terminal() -> Iterator[Callable[[], str | None]]:
    """Make stdout and stderr an `Output` each; returns a function that says, in the end, why stdout
    did not take everything: None if it did, or if its reader wanted no more."""
    before = sys.stdout, sys.stderr
    impossible = {
        n: v for n in ("COLUMNS", "LINES") if (v := os.environ.get(n, "")) and not _size(v)
    }
    for name in impossible:
        del os.environ[name]  # rich would print nothing at all in no columns
    sys.stdout, sys.stderr = (_output(stream) for stream in before)
    out = sys.stdout

    def lost() -> str | None:
        out.flush()
        failure = out.failure
        if failure is None or getattr(failure, "errno", None) in _GONE:
            return None
        return str(getattr(failure, "strerror", None) or failure)

    try:
        yield lost
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        os.environ.update(impossible)


def _size(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _output(stream: Any) -> Any:
    if isinstance(stream, Output):
        return stream
    if stream is None:  # closed before we started
        return Output(_NOWHERE, OSError(errno.EBADF, "it is closed"))
    return Output(stream)


class _Nowhere:
    """Stands in for a closed stream."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


_NOWHERE = _Nowhere()


def occupy_closed_descriptors() -> None:
    """Put the null device where stdin, stdout or stderr are closed: the next file that is opened
    would take that number, and output of C libraries would end up in a model's weights."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
