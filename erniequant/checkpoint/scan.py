"""Read every byte of a source once, before hours are spent on it: check that every weight is
finite, and hash the files."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erniequant.checkpoint.files import disk_error
from erniequant.checkpoint.reader import Checkpoint, TensorHeader, read_exactly
from erniequant.errors import ErnieQuantError

BLOCK = 16 << 20
"""Bytes read at once; a multiple of every element size."""

# All bits of the exponent: set in inf and nan only.
_EXPONENTS = {
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    torch.float32: (np.uint32, 0x7F800000),
    torch.float64: (np.uint64, 0x7FF0000000000000),
}


@dataclass(frozen=True)
class CheckedShard:
    """A source file that was read: size in bytes, time of change in ns, sha256."""

    file: str
    size: int
    mtime_ns: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def check_shards(
    checkpoint: Checkpoint, threads: int, done: Collection[str] = ()
) -> Iterator[CheckedShard]:
    """Read all shards but those ``done``, ``threads`` at a time, in their order.

    Raises:
        ErnieQuantError: a weight is inf or nan, or a file cannot be read.
    """
    shards = [shard for shard in checkpoint.shards if shard not in done]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(check_shard, checkpoint, shard) for shard in shards]
        try:
            for job in jobs:
                yield job.result()
        finally:
            for job in jobs:
                job.cancel()


def check_shard(checkpoint: Checkpoint, shard: str) -> CheckedShard:
    """Read one shard. Raises ErnieQuantError as `check_shards`."""
    path = checkpoint.path(shard)
    try:
        status = path.stat()
    except OSError as error:
        raise disk_error(path, error, "read") from error
    headers = [header for header in checkpoint.headers.values() if header.shard == shard]
    # An empty tensor begins where its neighbour does, whichever the header names first.
    headers.sort(key=lambda h: (h.offset, h.n_bytes))
    digest = hashlib.sha256()
    # Tensors follow one another without gaps, or the file would not have been opened.
    end = headers[0].offset
    for block in _blocks(path, 0, end):
        digest.update(block.data)
    for header in headers:
        end = header.offset + header.n_bytes
        for block in _blocks(path, header.offset, end):
            digest.update(block.data)
            if not _finite(block, header.dtype):
                raise _not_finite(header)
    # It may have grown since.
    for block in _blocks(path, end, status.st_size):
        digest.update(block.data)
    return CheckedShard(shard, status.st_size, status.st_mtime_ns, digest.hexdigest())


def changed_shards(checkpoint: Checkpoint, checked: Sequence[CheckedShard]) -> list[str]:
    """Shards that are gone or have changed; equal size and time count as unchanged."""
    changed = []
    for entry in checked:
        if entry.file in checkpoint.shards and (checkpoint.folder / entry.file).is_file():
            status = checkpoint.path(entry.file).stat()
            if (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime_ns):
                continue
            if check_shard(checkpoint, entry.file).sha256 == entry.sha256:
                continue
        changed.append(entry.file)
    return changed


def _blocks(path: Path, start: int, stop: int) -> Iterator[np.ndarray]:
    buffer = np.empty(min(BLOCK, max(stop - start, 0)), np.uint8)
    for begin in range(start, stop, BLOCK):
        block = buffer[: min(BLOCK, stop - begin)]
        try:
            read_exactly(path, begin, block)
        except OSError as error:
            raise disk_error(path, error, "read") from error
        yield block


def _finite(block: np.ndarray, dtype: torch.dtype | None) -> bool:
    if dtype in _EXPONENTS:
        kind, exponent = _EXPONENTS[dtype]
        bits = block.view(kind)
        return not bool(((bits & exponent) == exponent).any())
    if dtype is not None and dtype.is_floating_point:
        return bool(torch.isfinite(torch.from_numpy(block).view(dtype).float()).all())
    return True


def _not_finite(header: TensorHeader) -> ErnieQuantError:
    return ErnieQuantError(
        f"{header.name} in {header.shard} holds inf or nan; the source checkpoint is damaged: "
        "download or copy it again"
    )
