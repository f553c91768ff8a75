"""Write a folder of safetensors shards, so that a crash never leaves something that looks complete.

Shards are written to temporary names, flushed to disk and renamed; the index comes last. A reader
therefore sees either no checkpoint or a whole one.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from erniequant.checkpoint.reader import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from erniequant.errors import ErnieQuantError

MAX_SHARD_BYTES = 2_000_000_000
"""Default bound of a shard; also the memory that the writer holds."""

_COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_NOT_COPIED = {CONFIG_FILE, INDEX_FILE, "quantization_report.json"}
_COPIED_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What was written: sha256 of every shard by file name, and bytes of all tensors."""

    sha256: dict[str, str]
    total_bytes: int
    tensors: int


class CheckpointWriter:
    """Takes tensors one by one and writes them in shards; as a context manager, cleans up on error.

    Raises ErnieQuantError when the folder exists and holds anything, or cannot be written.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder, self._max = Path(folder), max_shard_bytes
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
            raise _disk_error(path.parent, error) from error
        self._shards.append((path, list(self._pending), digest))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> WrittenCheckpoint:
        """Write what is left, give the shards their names, write the index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        for number, (path, names, digest) in enumerate(self._shards, start=1):
            single = count == 1
            shard = SINGLE_FILE if single else f"model-{number:05d}-of-{count:05d}.safetensors"
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


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a JSON file as a whole: temporary name, flush to disk, rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(contents, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _disk_error(path, error) from error


def copy_companions(source: Path, destination: Path) -> list[str]:
    """Copy tokenizer, generation, processor and licence files unchanged; returns their names.

    Not copied: weights, config.json, the index, and a report about other weights.
    """
    copied = []
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
        wanted = wanted and path.name not in _NOT_COPIED
        wanted = wanted or path.name.startswith(("LICENSE", "NOTICE"))
        try:
            if path.is_file() and wanted:
                shutil.copyfile(path, destination / path.name)
            elif path.is_dir() and path.name in _COPIED_FOLDERS:
                shutil.copytree(path, destination / path.name)
            else:
                continue
        except OSError as error:
            raise _disk_error(destination / path.name, error) from error
        copied.append(path.name)
    return copied


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_and_hash(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sha256_of(path)


def _disk_error(path: Path, error: Exception) -> ErnieQuantError:
    reason = getattr(error, "strerror", None) or error
    return ErnieQuantError(f"cannot write {path}: {reason}; check space and rights")
