"""Options and output that all commands share."""

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from erniequant.errors import ErnieQuantError
from erniequant.paths import expanded
from erniequant_cli.errors import INTERRUPTED, complain, debugging, one_line


def writable(path: Path | None) -> Path | None:
    """Refuse a target that cannot be written: now, not after hours of work."""
    if path is None:
        return None
    target = expanded(path)
    parent = target.resolve().parent
    if target.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file")
    if not target.exists() and not parent.is_dir():
        raise typer.BadParameter(f"the folder of {path} does not exist")
    if not os.access(target if target.exists() else parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written; check permissions")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", callback=writable, help="Also write the result to FILE as JSON."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda", help="Device to compute on; auto takes a GPU if there is one."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="bfloat16|float32", help="Compute in this type instead of the checkpoint's own."
    ),
]


def deliver(
    result: Mapping[str, Any],
    json: Path | None,
    quiet: bool,
    draw: Callable[[], None],
    complete: str = "",
) -> None:
    """Write `result` to the file `json`, then print it by `draw` unless `quiet`.

    complete: says what is done, for the message in case `json` cannot be written.

    Raises:
        ErnieQuantError: it cannot; only after everything is printed.
    """
    failure = None
    try:
        write_json(json, result)
    except ErnieQuantError as error:
        done = f"; {complete}" if complete else ""
        failure = ErnieQuantError(f"--json: {error}{done}")
    if not quiet:
        show(draw)
    if failure is not None:
        raise failure


def show(draw: Callable[..., None], *arguments: Any) -> None:
    """Draw something; if that fails, say so: it does not change what was done."""
    try:
        draw(*arguments)
    except KeyboardInterrupt:
        complain("interrupted while printing; everything else is done")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debugging():
            raise
        complain(f"cannot print: {one_line(error)}; everything else is done")


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write `result` for other programs; non-finite numbers become null, which JSON can hold.

    A file appears as a whole or stays as it was. Raises ErnieQuantError where it cannot.
    """
    if path is None:
        return
    from erniequant.checkpoint.files import disk_error, write_file

    text = json.dumps(_finite(result), indent=2, allow_nan=False, default=str) + "\n"
    path = expanded(path)
    if is_stdout(path):
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        if path.is_file() or not path.exists():
            try:
                return write_file(path.resolve(), lambda file: file.write(text.encode()))
            except ErnieQuantError as error:
                if getattr(error.__cause__, "errno", None) not in _ONLY_IN_PLACE:
                    raise
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(path, error) from error


# No file can be renamed onto it, but it may be writable, such as a file mounted into a container.
_ONLY_IN_PLACE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ENAMETOOLONG)


def is_stdout(path: Path | None) -> bool:
    """True if a path such as /dev/stdout leads to where results are printed."""
    try:
        return path is not None and os.path.samestat(
            expanded(path).stat(), os.fstat(sys.stdout.fileno())
        )
    except (OSError, ValueError, AttributeError):
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
