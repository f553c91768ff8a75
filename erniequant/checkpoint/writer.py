"""Write a folder of safetensors shards, so that a crash never leaves something that looks complete.

Shards are written to temporary names, flushed to disk and renamed; the index comes last. A reader
therefore sees either no checkpoint or a whole one.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from erniequant.checkpoint.files import disk_error, sha256_of, write_json
from erniequant.checkpoint.layout import shard_name
from erniequant.checkpoint.reader import INDEX_FILE
from erniequant.errors import ErnieQuantError
from erniequant.paths import expanded

MAX_SHARD_BYTES = 2_000_000_000
"""Default bound of a shard; also the memory that the writer holds."""


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A written checkpoint: sha256 of every shard by file name, and bytes of all tensors."""

    sha256: dict[str, str]
    total_bytes: int
    tensors: int


class CheckpointWriter:
    """Takes tensors one by one and writes them in shards; as a context manager, cleans up on error.

    Raises ErnieQuantError when the folder exists and holds anything, or cannot be written.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder, self._max = expanded(folder), max_shard_bytes
        require_new_folder(self.folder)
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = self._total = 0
        self._shards: list[tuple[Path, list[str], str]] = []
        self._names: set[str] = set()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            for path, _, _ in self._shards:
                path.unlink(missing_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; writes a shard when the next would grow beyond its bound.

        Raises:
            ErnieQuantError: the name was used before, or the disk refuses.
        """
        if name in self._names:
            raise ErnieQuantError(f"tensor {name} was written twice")
        self._names.add(name)
        n_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + n_bytes > self._max:
            self._flush()
        # A view would keep all of its base in memory until the shard is written.
        owned = tensor.detach().cpu().contiguous()
        if owned.untyped_storage().nbytes() != n_bytes:
            owned = owned.clone()
        self._pending[name] = owned
        self._pending_bytes += n_bytes
        self._total += n_bytes

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.folder / f".shard-{len(self._shards) + 1:05d}.partial"
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
            # The library makes files that only their owner may read; follow the folder instead.
            path.chmod(self.folder.stat().st_mode & 0o666)
            digest = _sync_and_hash(path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise disk_error(path.parent, error) from error
        self._shards.append((path, list(self._pending), digest))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> WrittenCheckpoint:
        """Write what is left, give the shards their names, write the index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        for number, (path, names, digest) in enumerate(self._shards, start=1):
            shard = shard_name(number, count)
            os.replace(path, self.folder / shard)
            weight_map |= dict.fromkeys(names, shard)
            digests[shard] = digest
        self._shards = []
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILE, index)
        return WrittenCheckpoint(digests, self._total, len(weight_map))


def require_new_folder(folder: Path) -> None:
    """Make a folder, or accept an empty one. Raises ErnieQuantError if it holds anything."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise ErnieQuantError(f"cannot make the folder {folder}: {error.strerror}") from error
    if used:
        raise ErnieQuantError(f"{folder} is not empty; give a new folder")


def _sync_and_hash(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sha256_of(path)
