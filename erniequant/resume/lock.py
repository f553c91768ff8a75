"""One run at a time in a work folder."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from erniequant.checkpoint.files import disk_error
from erniequant.errors import ErnieQuantError


class Lock:
    """An exclusive lock on a file, which the system drops when its holder dies.

    Raises:
        ErnieQuantError: another process holds it, with its pid and host; or there are no locks.
    """

    def __init__(self, path: Path):
        self._descriptor = _locked(path)
        # A holder that ends deletes its file, perhaps between our opening and our locking of it:
        # then others do not see our lock.
        while not _is_at(self._descriptor, path):
            self.release()
            self._descriptor = _locked(path)
        me = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, me, 0)
        except OSError as error:
            self.release()
            raise disk_error(path, error) from error

    def release(self) -> None:
        """Let others in. Doing it again changes nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _locked(path: Path) -> int:
    """A descriptor of a file that holds its lock."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise ErnieQuantError(
            f"another run (pid {holder.get('pid', 'unknown')} on "
            f"{holder.get('host', 'an unknown host')}) is at work in {path.parent}; wait for "
            "it, or stop it first"
        ) from error
    except OSError as error:  # some network file systems have no locks
        os.close(descriptor)
        raise disk_error(path, error, "lock") from error
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
