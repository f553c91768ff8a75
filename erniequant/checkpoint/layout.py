"""The place of every tensor of a checkpoint, decided before the first byte is written.

A shard whose tensors are all known beforehand can be made at its full size at once and filled in
any order, by parts of tensors, without holding any of it in memory.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from erniequant.checkpoint.reader import DTYPES, SINGLE_FILE, TensorHeader

STORED_DTYPES = {dtype: stored for stored, dtype in DTYPES.items()}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written; ``stored_dtype`` is its name in a safetensors header."""

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    n_bytes: int

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> "OutputTensor":
        """A tensor of a torch dtype."""
        return cls(name, shape, STORED_DTYPES[dtype], math.prod(shape) * dtype.itemsize)

    @classmethod
    def copy_of(cls, header: TensorHeader) -> "OutputTensor":
        """A tensor of a source checkpoint, as it is."""
        return cls(header.name, header.shape, header.stored_dtype, header.n_bytes)


@dataclass(frozen=True)
class PlannedShard:
    """One file: its header as bytes, and where each tensor begins."""

    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    offsets: dict[str, int]
    n_bytes: int


def plan_shards(tensors: Iterable[OutputTensor], max_bytes: int) -> tuple[PlannedShard, ...]:
    """Distribute tensors over shards of at most ``max_bytes`` in the order given; a tensor larger
    than that has a shard of its own."""
    contents: list[list[OutputTensor]] = []
    size = max_bytes
    for tensor in tensors:
        if not contents or size + tensor.n_bytes > max_bytes:
            contents.append([])
            size = 0
        contents[-1].append(tensor)
        size += tensor.n_bytes
    total = len(contents)
    return tuple(
        _shard(shard_name(number, total), tensors) for number, tensors in enumerate(contents, 1)
    )


def shard_name(number: int, total: int) -> str:
    """File name of a shard, counted from 1."""
    return SINGLE_FILE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def index_of(shards: Iterable[PlannedShard]) -> dict[str, Any]:
    """Contents of the index file."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.n_bytes for shard in shards for tensor in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _shard(file: str, tensors: list[OutputTensor]) -> PlannedShard:
    # Wide types first: every tensor is aligned to its element, as readers that map files need.
    ordered = sorted(tensors, key=lambda t: -_item_size(t))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": tensor.stored_dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.n_bytes],
        }
        begin += tensor.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = {}
    position = len(header)
    for tensor in ordered:
        offsets[tensor.name] = position
        position += tensor.n_bytes
    return PlannedShard(file, header, tuple(ordered), offsets, position)


def _item_size(tensor: OutputTensor) -> int:
    dtype = DTYPES.get(tensor.stored_dtype)
    if dtype is not None:
        return dtype.itemsize
    return tensor.n_bytes // max(math.prod(tensor.shape), 1)
