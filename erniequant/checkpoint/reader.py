"""Read a folder of safetensors shards: headers first, tensors one at a time.

Opening reads only headers, and finds damage that would otherwise surface hours later: missing or
truncated shards, an index that disagrees with the files, weights that exist only as pickle.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.adapters import refuse_adapter_alone
from erniequant.checkpoint.config import CONFIG_FILE, read_config, read_json
from erniequant.checkpoint.hub import HubRepository
from erniequant.checkpoint.pointers import refuse_pointer
from erniequant.checkpoint.strict_json import is_plain_file_name, parse_json
from erniequant.errors import ErnieQuantError
from erniequant.paths import expanded

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
WORK_FOLDER = ".erniequant-work"
"""Folder inside the destination where `erniequant.resume` keeps an unfinished run."""
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.pdparams")
_LENGTH_BYTES = 8
# The safetensors library refuses longer headers; a damaged length would ask for gigabytes.
_MAX_HEADER_BYTES = 100_000_000
# Beyond these torch cannot make a tensor, even an empty one.
_MAX_DIMENSIONS, _MAX_ELEMENTS = 64, 2**62
_MAX_NAME = 1000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Types of safetensors that torch lacks or we have no use for, and the bits of an element.
_OTHER_BITS = {
    "U16": 16, "U32": 32, "U64": 64, "C64": 64, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in a shard's header; ``dtype`` is None for a type torch lacks.

    ``offset`` is where its ``n_bytes`` begin in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored_dtype: str
    n_bytes: int
    shard: str
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Checkpoint:
    """A folder of safetensors shards with its config.json; of a model on Hugging Face, shards
    arrive when they are first needed.

    Attributes:
        folder: where it is.
        config: contents of config.json, as `config.plain_settings` leaves them.
        headers: every tensor by name, in file order.
        shards: names of the files that hold tensors.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        headers: Mapping[str, TensorHeader],
        hub: HubRepository | None = None,
    ):
        self.folder, self.config, self.headers = folder, config, dict(headers)
        self.shards = tuple(dict.fromkeys(header.shard for header in headers.values()))
        self._hub = hub
        self._absent = {s for s in self.shards if hub is not None and not (folder / s).is_file()}

    @property
    def absent_bytes(self) -> int:
        """Bytes of tensors that are still to be downloaded."""
        return sum(h.n_bytes for h in self.headers.values() if h.shard in self._absent)

    def path(self, shard: str) -> Path:
        """The file of a shard, downloaded first if need be.

        Raises:
            ErnieQuantError: the download fails, or it is not what its repository promised.
        """
        path = self.folder / shard
        if self._hub is not None and shard in self._absent:
            self._hub.fetch(shard)
            headers = read_header(path)
            promised = {n: h for n, h in self.headers.items() if h.shard == shard}
            if {n: _kind(h) for n, h in headers.items()} != {
                n: _kind(h) for n, h in promised.items()
            }:
                raise ErnieQuantError(
                    f"{path} holds other tensors than its repository listed; try again"
                )
            self.headers |= headers
            self._absent.discard(shard)
        return path

    def fetch(self) -> None:
        """Download what is not here yet."""
        for shard in self.shards:
            self.path(shard)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.headers)

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of a tensor. Raises ErnieQuantError if there is none of that name."""
        if name not in self.headers:
            raise ErnieQuantError(f"{self.folder}: tensor {name} is missing from the checkpoint")
        return self.headers[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype.

        Raises:
            ErnieQuantError: missing, of a type that torch lacks, or its file cannot be read.
        """
        header = self.header(name)
        flat = self._read(name, 0, header.elements)
        return flat.view(header.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start..stop-1`` of a tensor along its first dimension; reads nothing else."""
        header = self.header(name)
        width = math.prod(header.shape[1:])
        return self._read(name, start * width, stop * width).view(-1, *header.shape[1:])

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        path = self.path(self.headers[name].shard)
        header = self.headers[name]
        # Plain reads instead of a mapped file: pages of a mapping count as memory of the process
        # until they are unmapped, which for a 5 GB shard is the whole shard.
        if header.dtype is None:
            raise ErnieQuantError(
                f"tensor {header.name} is stored as {header.stored_dtype}, which torch cannot hold"
            )
        tensor = torch.empty(stop - start, dtype=header.dtype)
        size = header.dtype.itemsize
        try:
            read_exactly(path, header.offset + start * size, tensor.view(torch.uint8).numpy())
        except OSError as error:
            raise ErnieQuantError(
                f"cannot read tensor {header.name} from {path}: {error.strerror or error}"
            ) from error
        return tensor

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.n_bytes for header in self.headers.values())


def read_exactly(path: Path, offset: int, buffer: Any) -> None:
    """Fill a writable buffer of bytes from a file. Raises OSError where the file is too short."""
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise OSError(f"the file ends at byte {offset + done}")
            done += count


def _local_folder(source: str | Path) -> Path | None:
    """The folder of a local checkpoint, None for a Hugging Face id.

    Raises:
        ErnieQuantError: it is neither.
    """
    folder = expanded(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ErnieQuantError(f"{source} is a file; give the folder that holds config.json")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ErnieQuantError(f"no folder {source}; give a checkpoint folder or a Hugging Face id")
    return None


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint by its folder or Hugging Face id, reading headers only.

    Raises:
        ErnieQuantError: anything missing, truncated or inconsistent, with the file or tensor named.
    """
    folder = _local_folder(source)
    hub = HubRepository(str(source)) if folder is None else None
    folder = hub.folder if hub is not None else folder
    assert folder is not None
    if not (folder / CONFIG_FILE).exists() and (folder / WORK_FOLDER).is_dir():
        raise ErnieQuantError(
            f"{folder} holds an unfinished quantisation; repeat its command to complete it"
        )
    if not (folder / CONFIG_FILE).exists():
        refuse_adapter_alone(folder)
    config = read_config(folder)
    index = folder / INDEX_FILE
    single = (folder / SINGLE_FILE).is_file()
    remote = {} if hub is None else _remote_headers(hub, index, single)
    if index.is_file():
        return Checkpoint(folder, config, read_sharded(folder, index, remote), hub)
    if single or SINGLE_FILE in remote:
        headers = read_header(folder / SINGLE_FILE) if single else remote[SINGLE_FILE]
        return Checkpoint(folder, config, headers, hub)
    refuse_adapter_alone(folder)
    pickles = sorted(p.name for pattern in PICKLE_PATTERNS for p in folder.glob(pattern))
    if pickles:
        raise ErnieQuantError(
            f"{folder} has its weights only as pickle ({pickles[0]}); convert them to safetensors"
        )
    raise ErnieQuantError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _remote_headers(
    hub: HubRepository, index: Path, single: bool
) -> dict[str, dict[str, TensorHeader]]:
    """Headers of shards that are not here yet, without their offsets; sends no request if all are
    here."""
    if index.is_file():
        listed = read_json(index).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        if all((index.parent / str(name)).is_file() for name in names):
            return {}
    elif single:
        return {}
    try:
        return {
            shard: {name: _entry(name, entry, shard, 0) for name, entry in entries.items()}
            for shard, entries in hub.remote_headers().items()
        }
    except ValueError as error:
        raise ErnieQuantError(f"{hub.name} has a damaged header: {error}") from error


def _kind(header: TensorHeader) -> tuple[str, tuple[int, ...]]:
    return header.stored_dtype, header.shape


def read_sharded(
    folder: Path, index: Path, remote: Mapping[str, Mapping[str, TensorHeader]]
) -> dict[str, TensorHeader]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ErnieQuantError(f"{index} has no weight_map; the index is damaged")
    for name, shard in weight_map.items():
        # transformers would unpickle a file of another suffix.
        if not is_plain_file_name(shard) or not shard.endswith(".safetensors"):
            raise ErnieQuantError(
                f"{index} names {shard!r} for {name}, which is not a safetensors file in its folder"
            )
    if (folder / SINGLE_FILE).is_file() and SINGLE_FILE not in weight_map.values():
        # Libraries differ in which of the two they read.
        raise ErnieQuantError(
            f"{folder} has both {INDEX_FILE} and {SINGLE_FILE}, of different weights; remove one"
        )
    headers: dict[str, TensorHeader] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = folder / shard
        if not path.is_file() and shard not in remote:
            name = next(name for name, file in weight_map.items() if file == shard)
            raise ErnieQuantError(
                f"{index} names {shard} (for example for {name}), but there is no such file; "
                "complete the download or copy"
            )
        own_headers = read_header(path) if path.is_file() else remote[shard]
        for name, header in own_headers.items():
            if weight_map.get(name) != shard:
                raise ErnieQuantError(f"{shard} holds {name}, but {index} does not say so")
            headers[name] = header
    for name, shard in weight_map.items():
        if name not in headers:
            raise ErnieQuantError(f"{index} says that {shard} holds {name}, but it does not")
    return headers


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file, which cover its data without gaps or overlaps.

    Raises:
        ErnieQuantError: not a safetensors file, a Git LFS pointer, or shorter or longer than its
            header promises.
    """
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else size
            if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                raise ErnieQuantError(f"{path} is truncated or not safetensors (header incomplete)")
            text = file.read(length)
    except OSError as error:
        raise ErnieQuantError(f"{path} cannot be read: {error.strerror}") from error
    try:
        entries = _entries(text)
        data = _LENGTH_BYTES + length
        headers = {name: _entry(name, entry, path.name, data) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ErnieQuantError(f"{path} has a damaged header: {error}") from error
    _require_contiguous(path, entries, size - _LENGTH_BYTES - length)
    return headers


def _entries(text: bytes) -> dict[str, Any]:
    entries = parse_json(text)
    # safetensors takes no space before the brace.
    if not isinstance(entries, dict) or not text.startswith(b"{"):
        raise ValueError("it is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        return entries
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")
    return entries


def _entry(name: str, entry: Any, shard: str, data: int) -> TensorHeader:
    if not isinstance(entry, dict) or not set(entry) >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:_MAX_NAME]} has no dtype, shape and data_offsets")
    if len(name) > _MAX_NAME:
        raise ValueError(f"a tensor has a name of {len(name)} letters: {name[:60]}")
    offsets, shape, stored = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name} has data_offsets {str(offsets)[:60]}")
    sound = _are_sizes(shape) and len(shape) <= _MAX_DIMENSIONS
    # An empty tensor too has strides, which are products of the other sizes.
    if not sound or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise ValueError(f"tensor {name} has shape {str(shape)[:60]}")
    if not isinstance(stored, str) or stored not in DTYPES.keys() | _OTHER_BITS:
        raise ValueError(f"tensor {name} has dtype {str(stored)[:60]}")
    n_bytes = offsets[1] - offsets[0]
    header = TensorHeader(
        name, tuple(shape), DTYPES.get(stored), stored, n_bytes, shard, data + offsets[0]
    )
    bits = 8 * header.dtype.itemsize if header.dtype else _OTHER_BITS[stored]
    if header.elements * bits != 8 * n_bytes:
        raise ValueError(f"tensor {name} has {n_bytes} bytes for shape {shape} of {stored}")
    return header


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _require_contiguous(path: Path, entries: dict[str, Any], available: int) -> None:
    covered = 0
    ranges = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    for begin, end, name in ranges:
        if begin != covered:
            raise ErnieQuantError(
                f"{path} has a damaged header: tensor {name} begins at {begin}, not at {covered} "
                "where the one before it ends"
            )
        covered = end
        if end > available:
            raise ErnieQuantError(
                f"{path} is truncated: tensor {name} ends {end - available} bytes after the file; "
                "download or copy it again"
            )
    if covered < available:
        raise ErnieQuantError(
            f"{path} is damaged: {available - covered} bytes after the last tensor belong to none"
        )
