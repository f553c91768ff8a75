"""Whole files or none: JSON and binary files that appear by write, flush and rename; checksums."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from erniequant.errors import ErnieQuantError


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Make a file that ``write`` fills: temporary name, flush to disk, rename.

    Raises:
        ErnieQuantError: the disk refuses; nothing is left then.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        discard(partial)
        raise disk_error(path, error) from error


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a JSON file as a whole."""
    try:
        data = json.dumps(contents, indent=2, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        # A file's name may have bytes that are not text; JSON can hold them as escapes.
        data = json.dumps(contents, indent=2).encode("utf-8")
    write_file(path, lambda file: file.write(data + b"\n"))


def discard(path: Path) -> None:
    """Delete a file that could not be written; if that fails too, the first error says why."""
    with contextlib.suppress(OSError):
        path.unlink()


def delete(path: Path) -> None:
    """Delete a file if it is there. Raises ErnieQuantError if the disk refuses."""
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise disk_error(path, error, "delete") from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot; files themselves are on the disk
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def disk_error(path: Path, error: Exception, doing: str = "write") -> ErnieQuantError:
    """The one-line error for a disk that refuses."""
    reason = getattr(error, "strerror", None) or error
    return ErnieQuantError(f"cannot {doing} {path}: {reason}; check space and permissions")
