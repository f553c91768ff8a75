"""Fill planned shards part by part, so that a kill at any moment loses only what was in flight.

A shard is made at its full size under a temporary name (a disk that is too small says so at once),
filled at known offsets, and gets its name once everything in it is on the disk. Nobody mistakes
an unfinished file for a finished one.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from erniequant.checkpoint.files import delete, discard, disk_error, sha256_of, sync_folder
from erniequant.checkpoint.layout import OutputTensor, PlannedShard
from erniequant.checkpoint.reader import Checkpoint, read_exactly

COPY_BLOCK = 16 << 20
"""Bytes in memory while a tensor is copied."""


class ShardFiles:
    """The shards of one checkpoint in a folder, each absent, partial or finished."""

    def __init__(self, folder: Path, shards: Sequence[PlannedShard]):
        self.folder, self.shards = folder, tuple(shards)
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "ShardFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def shard_of(self, name: str) -> PlannedShard:
        """The shard that a tensor belongs to."""
        return self._shard_of[name]

    def partial(self, shard: PlannedShard) -> Path:
        """Path of a shard before it is finished."""
        return self.folder / f".{shard.file}.partial"

    def finished(self, shard: PlannedShard) -> bool:
        """True if a shard has its final name."""
        return (self.folder / shard.file).is_file()

    def prepare(self) -> None:
        """Make every shard that is not there at its full size.

        Raises:
            ErnieQuantError: the disk is too small, or the folder cannot be written.
        """
        for shard in self.shards:
            path = self.partial(shard)
            if self.finished(shard) or _is_prepared(path, shard):
                continue
            try:
                with path.open("wb") as file:
                    file.write(shard.header)
                    file.flush()
                    _reserve(file.fileno(), shard.n_bytes)
                    os.fsync(file.fileno())
            except OSError as error:
                discard(path)
                raise disk_error(path, error) from error
        sync_folder(self.folder)

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Put a tensor, or some rows of it from ``row`` on, into its place."""
        planned = self._tensors[name]
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        width = planned.n_bytes // max(planned.shape[0], 1) if planned.shape else 0
        if row < 0 or row * width + data.nbytes > planned.n_bytes:
            raise ValueError(f"{name}: rows from {row} do not fit the planned {planned.shape}")
        self._put(planned, row * width, data)

    def copy(self, name: str, source: Checkpoint) -> None:
        """Copy a tensor's bytes from a source checkpoint."""
        planned = self._tensors[name]
        path = source.path(source.header(name).shard)
        header = source.header(name)
        for start in range(0, header.n_bytes, COPY_BLOCK):
            block = bytearray(min(COPY_BLOCK, header.n_bytes - start))
            try:
                read_exactly(path, header.offset + start, block)
            except OSError as error:
                raise disk_error(path, error, "read") from error
            self._put(planned, start, memoryview(block))

    def read(self, name: str, row: int, rows: int) -> bytes:
        """The bytes of some rows as they are on the disk now."""
        planned, shard = self._tensors[name], self._shard_of[name]
        path = self.folder / shard.file if self.finished(shard) else self.partial(shard)
        width = planned.n_bytes // max(planned.shape[0], 1)
        buffer = bytearray(rows * width)
        try:
            read_exactly(path, shard.offsets[name] + row * width, buffer)
        except OSError as error:
            raise disk_error(path, error, "read") from error
        return bytes(buffer)

    def read_whole(self, name: str) -> bytes:
        """The bytes of a tensor as they are on the disk now."""
        shape = self._tensors[name].shape
        return self.read(name, 0, shape[0] if shape else 1)

    def sync(self, names: Sequence[str]) -> None:
        """Return when everything written to the shards of these tensors is on the disk."""
        for shard in {self._shard_of[name].file: self._shard_of[name] for name in names}.values():
            try:
                os.fdatasync(self._descriptor(shard))
            except OSError as error:
                raise disk_error(self.partial(shard), error) from error

    def finish(self, shard: PlannedShard) -> str:
        """Give a complete shard its name; returns its sha256. Doing it again changes nothing."""
        final = self.folder / shard.file
        try:
            if not self.finished(shard):
                self.sync([shard.tensors[0].name])
                os.close(self._descriptors.pop(shard.file))
                os.replace(self.partial(shard), final)
                sync_folder(self.folder)
            return sha256_of(final)
        except OSError as error:
            raise disk_error(final, error) from error

    def remove(self) -> None:
        """Delete every shard, partial or finished. Raises ErnieQuantError if the disk refuses."""
        for shard in self.shards:
            delete(self.partial(shard))
            delete(self.folder / shard.file)

    def _descriptor(self, shard: PlannedShard) -> int:
        if shard.file not in self._descriptors:
            self._descriptors[shard.file] = os.open(self.partial(shard), os.O_RDWR)
        return self._descriptors[shard.file]

    def _put(self, planned: OutputTensor, start: int, data: memoryview) -> None:
        shard = self._shard_of[planned.name]
        position = shard.offsets[planned.name] + start
        try:
            descriptor = self._descriptor(shard)
            while data:
                count = os.pwrite(descriptor, data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise disk_error(self.partial(shard), error) from error


def _is_prepared(path: Path, shard: PlannedShard) -> bool:
    """True if a partial shard was made to its end. Its size alone does not tell: the power may have
    gone before its header was on the disk."""
    try:
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header and (
                os.fstat(file.fileno()).st_size == shard.n_bytes
            )
    except OSError:
        return False


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size and, where the system can, the disk space for it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)
