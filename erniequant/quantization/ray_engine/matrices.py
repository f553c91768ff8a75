"""Source matrices of a job: read by the worker where it sees the same files, else sent to it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from erniequant.checkpoint.reader import Checkpoint, TensorHeader
from erniequant.models.architecture import TensorSource

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class SeenFile:
    """A safetensors file as one process sees it: where, its bytes, when it was changed, and the
    sha256 of its header. Headers of models of one kind are alike, so the header alone would not
    do."""

    path: str
    size: int
    mtime_ns: int
    header: str

    def is_here(self) -> bool:
        """Whether this process sees the same."""
        return _is_here(self)


def seen_file(path: Path) -> SeenFile:
    """A file as this process sees it. Raises OSError where it cannot be read."""
    stat = path.stat()
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        header = file.read(min(int.from_bytes(length, "little"), stat.st_size))
    digest = hashlib.sha256(length + header).hexdigest()
    return SeenFile(str(path), stat.st_size, stat.st_mtime_ns, digest)


@cache
def _is_here(file: SeenFile) -> bool:
    try:
        return seen_file(Path(file.path)) == file
    except OSError:
        return False


@dataclass(frozen=True, eq=False)
class StoredMatrices:
    """Matrices in files: their headers, and the files as the sender sees them."""

    folder: Path
    headers: Mapping[str, TensorHeader]
    files: tuple[SeenFile, ...]

    def are_here(self) -> bool:
        """Whether this process sees the same files."""
        return all(file.is_here() for file in self.files)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.headers)

    def tensor(self, name: str) -> torch.Tensor:
        """See `Checkpoint.tensor`."""
        return Checkpoint(self.folder, {}, self.headers).tensor(name)


@dataclass(frozen=True, eq=False)
class SentMatrices:
    """Matrices that come with the job."""

    tensors: Mapping[str, torch.Tensor]

    def are_here(self) -> bool:
        """They are."""
        return True

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype."""
        return self.tensors[name]


Matrices = StoredMatrices | SentMatrices


class Reader:
    """The source on the side of the driver."""

    def __init__(self, source: TensorSource):
        self._source = source
        self._files: dict[str, SeenFile] = {}

    def first_file(self) -> SeenFile | None:
        """A file of the source; None if it is not in files."""
        source = self._source
        return self._seen(source, source.shards[0]) if isinstance(source, Checkpoint) else None

    def stored(self, names: list[str]) -> StoredMatrices | None:
        """Where matrices are; None if not in files.

        Raises:
            ErnieQuantError: one is missing from the checkpoint.
        """
        source = self._source
        if not isinstance(source, Checkpoint):
            return None
        headers = {name: source.header(name) for name in names}
        files = tuple(self._seen(source, h.shard) for h in headers.values())
        return StoredMatrices(source.folder.resolve(), headers, tuple(dict.fromkeys(files)))

    def _seen(self, checkpoint: Checkpoint, shard: str) -> SeenFile:
        if shard not in self._files:
            path = checkpoint.folder.resolve() / checkpoint.path(shard).name
            self._files[shard] = seen_file(path)
        return self._files[shard]

    def sent(self, names: list[str]) -> SentMatrices:
        """The matrices themselves.

        Raises:
            ErnieQuantError: one cannot be read.
        """
        return SentMatrices({name: self._source.tensor(name) for name in names})
