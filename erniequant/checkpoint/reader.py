"""Read a folder of safetensors shards: headers first, tensors one at a time.

Opening reads only headers, and finds damage that would otherwise surface hours later: missing or
truncated shards, an index that disagrees with the files, weights that exist only as pickle.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.errors import ErnieQuantError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.pdparams")
DOWNLOAD_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "LICENSE*",
)
_LENGTH_BYTES = 8
# The safetensors library refuses longer headers; a damaged length would ask for gigabytes.
_MAX_HEADER_BYTES = 100_000_000
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


@dataclass(frozen=True)
class TensorHeader:
    """What a shard's header says about a tensor; ``dtype`` is None for a type torch lacks.

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
    """A folder of safetensors shards with its config.json.

    Attributes:
        folder: where it is.
        config: contents of config.json.
        headers: every tensor by name, in file order.
        shards: names of the files that hold tensors.
    """

    def __init__(self, folder: Path, config: dict[str, Any], headers: Mapping[str, TensorHeader]):
        self.folder, self.config, self.headers = folder, config, headers
        self.shards = tuple(dict.fromkeys(header.shard for header in headers.values()))

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
        flat = self._read(header, 0, header.elements)
        return flat.view(header.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start..stop-1`` of a tensor along its first dimension; reads nothing else."""
        header = self.header(name)
        width = math.prod(header.shape[1:])
        return self._read(header, start * width, stop * width).view(-1, *header.shape[1:])

    def _read(self, header: TensorHeader, start: int, stop: int) -> torch.Tensor:
        # Plain reads instead of a mapped file: pages of a mapping count as memory of the process
        # until they are unmapped, which for a 5 GB shard is the whole shard.
        if header.dtype is None:
            raise ErnieQuantError(
                f"tensor {header.name} is stored as {header.stored_dtype}, which torch cannot hold"
            )
        tensor = torch.empty(stop - start, dtype=header.dtype)
        size = header.dtype.itemsize
        path = self.folder / header.shard
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


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or a Hugging Face id, downloaded if need be.

    Raises:
        ErnieQuantError: no such folder, or the download failed.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ErnieQuantError(f"{source} is a file; give the folder that holds config.json")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ErnieQuantError(f"no folder {source}; give a checkpoint folder or a Hugging Face id")
    from huggingface_hub import snapshot_download

    patterns = [p for p in DOWNLOAD_PATTERNS if weights or p != "*.safetensors"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ErnieQuantError(
            f"no folder {source}, and it cannot be had from Hugging Face: {reason}"
        ) from error


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint by its folder or Hugging Face id, reading headers only.

    Raises:
        ErnieQuantError: anything missing, truncated or inconsistent, with the file or tensor named.
    """
    folder = locate(source)
    config = read_json(folder / CONFIG_FILE)
    index = folder / INDEX_FILE
    if index.is_file():
        return Checkpoint(folder, config, _read_sharded(folder, index))
    if (folder / SINGLE_FILE).is_file():
        return Checkpoint(folder, config, read_header(folder / SINGLE_FILE))
    pickles = sorted(p.name for pattern in PICKLE_PATTERNS for p in folder.glob(pattern))
    if pickles:
        raise ErnieQuantError(
            f"{folder} has its weights only as pickle ({pickles[0]}); convert them to safetensors"
        )
    raise ErnieQuantError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorHeader]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ErnieQuantError(f"{index} has no weight_map; the index is damaged")
    headers: dict[str, TensorHeader] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = folder / shard
        if not path.is_file():
            name = next(name for name, file in weight_map.items() if file == shard)
            raise ErnieQuantError(
                f"{index} names {shard} (for example for {name}), but there is no such file; "
                "complete the download or copy"
            )
        headers |= read_header(path)
    for name, shard in weight_map.items():
        if name not in headers or headers[name].shard != shard:
            raise ErnieQuantError(f"{index} says that {shard} holds {name}, but it does not")
    return headers


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file.

    Raises:
        ErnieQuantError: not a safetensors file, or shorter than its header promises.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else size
        if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise ErnieQuantError(f"{path} is truncated or not safetensors (header incomplete)")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            data = _LENGTH_BYTES + length
            found = {name: _entry(name, entry, path.name, data) for name, entry in entries.items()}
            ends = {name: entry["data_offsets"][1] for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ErnieQuantError(f"{path} has a damaged header: {error}") from error
    available = size - _LENGTH_BYTES - length
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > available:
            raise ErnieQuantError(
                f"{path} is truncated: tensor {name} ends {end - available} bytes after the file; "
                "download or copy it again"
            )
    return found


def _entry(name: str, entry: dict[str, Any], shard: str, data: int) -> TensorHeader:
    begin, end = entry["data_offsets"]
    shape, stored = tuple(entry["shape"]), entry["dtype"]
    header = TensorHeader(name, shape, DTYPES.get(stored), stored, end - begin, shard, data + begin)
    if header.dtype is not None and header.elements * header.dtype.itemsize != header.n_bytes:
        raise ValueError(
            f"tensor {name} has {header.n_bytes} bytes for shape {list(shape)} of {stored}"
        )
    return header


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ErnieQuantError if it is missing or damaged."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ErnieQuantError(
            f"{path.parent} has no {path.name}; it is not a checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise ErnieQuantError(f"{path} cannot be read: {error}") from error
    if not isinstance(contents, dict):
        raise ErnieQuantError(f"{path} does not hold a JSON object")
    return contents
