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
        ErnieQuantError: another process holds it, with its pid and host.
    """

    def __init__(self, path: Path):
        import fcntl

        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise disk_error(path, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(self._descriptor)
            os.close(self._descriptor)
            raise ErnieQuantError(
                f"another run (pid {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'an unknown host')}) is at work in {path.parent}; wait for "
                "it, or stop it first"
            ) from error
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


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
