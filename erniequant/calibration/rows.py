"""Tables of activations that may be larger than memory: float32 rows in RAM or in a mapped file.

A mapped table lives in a file without a name, so nothing is left of it however the process ends.
Its space is reserved when it is made: a disk that fills up later would kill the process by a
signal, not an error. What was touched stays in memory until `Rows.release`.
"""

import contextlib
import mmap
import os
import tempfile
from pathlib import Path

import torch

from erniequant.checkpoint.files import disk_error


class Rows:
    """A float32 table ``[rows, columns]``; ``tensor`` is all of it. Pickled, it becomes one in
    memory."""

    def __init__(self, tensor: torch.Tensor, mapping: mmap.mmap | None = None):
        self.tensor = tensor
        self._mapping = mapping

    def release(self) -> None:
        """Let go of the memory of a mapped table; its contents stay in the file."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[type["Rows"], tuple[torch.Tensor]]:
        return Rows, (self.tensor,)


class RowPool:
    """Makes tables in memory, or in files of ``folder`` if one is given."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    def empty(self, rows: int, columns: int) -> Rows:
        """A table with undefined contents.

        Raises:
            ErnieQuantError: the disk has no room for it.
        """
        n_bytes = 4 * rows * columns
        if self.folder is None or not n_bytes:
            return Rows(torch.empty(rows, columns))
        try:
            with tempfile.TemporaryFile(dir=self.folder, prefix="rows-") as file:
                with contextlib.suppress(AttributeError):  # macOS lacks it
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                file.truncate(n_bytes)
                mapping = mmap.mmap(file.fileno(), n_bytes)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        return Rows(torch.frombuffer(mapping, dtype=torch.float32).view(rows, columns), mapping)
