"""Write a checkpoint for FastDeploy, streaming: one matrix in memory, every file planned first.

Weights that are not experts come from the original; experts come encoded from the caller. Files
appear under their names when they are complete, config.json last, so nothing half-written loads.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from erniequant.checkpoint.files import delete, write_json
from erniequant.checkpoint.layout import OutputTensor, PlannedShard, index_of, plan_shards
from erniequant.checkpoint.reader import INDEX_FILE
from erniequant.checkpoint.shards import ShardFiles
from erniequant.checkpoint.writer import MAX_SHARD_BYTES, require_new_folder
from erniequant.formats.fastdeploy.convert import encoded_to_rank, plain_to_rank, wint8_to_rank
from erniequant.formats.fastdeploy.names import Matrix, Part, Plain, parts_of, rank_keys
from erniequant.formats.fastdeploy.sizes import (
    FastDeployModel,
)
from erniequant.formats.results import WrittenShards
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.version import PRODUCER

Experts = Callable[[int, int, str], Mapping[str, torch.Tensor]]
"""Layer, expert and "up_gate_proj" or "down_proj" to the encoded matrix, undivided, by suffix of
the keys: see `names.Matrix.keys`. Called once each, in the order of layers and experts."""


def write_parts(
    folder: Path,
    model: FastDeployModel,
    k_order: str,
    tensors: Callable[[Part], Iterator[dict[str, torch.Tensor]]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write the weights into a new folder; sha256 of every file by its path below the folder.

    Args:
        tensors: the keys of a part, for one rank after the other.

    Raises:
        ErnieQuantError: the folder is not new, or the disk refuses.
    """
    require_new_folder(folder)
    shards = planned_shards(model, k_order, max_shard_bytes)
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        files = []
        for rank_folder in rank_folders(folder, model.tensor_parallel):
            rank_folder.mkdir(exist_ok=True)
            cleaned = _removed_on_error(ShardFiles(rank_folder, shards), folder)
            files.append(stack.enter_context(cleaned))
        for each in files:
            each.prepare()
        for part in parts_of(model):
            for rank, keys in enumerate(tensors(part)):
                for key, tensor in keys.items():
                    files[rank].write(key, tensor)
        for each in files:
            for shard in shards:
                path = (each.folder / shard.file).relative_to(folder)
                digests[path.as_posix()] = each.finish(shard)
            if len(shards) > 1:
                write_json(each.folder / INDEX_FILE, index_of(shards))
    return digests


def written(
    folder: Path, model: FastDeployModel, digests: dict[str, str], left_out: tuple[str, ...] = ()
) -> WrittenShards:
    """Summary of a folder that was written."""
    outputs = [OutputTensor.of(key, *info) for key, info in rank_keys(model).items()]
    ranks = model.tensor_parallel
    total = ranks * sum(tensor.n_bytes for tensor in outputs)
    return WrittenShards(str(folder), digests, total, ranks * len(outputs), left_out)


def rank_folders(folder: Path, ranks: int) -> list[Path]:
    """The folder of each rank's files: the folder itself if there is one rank."""
    return [folder] if ranks == 1 else [folder / f"rank{rank}" for rank in range(ranks)]


def planned_shards(
    model: FastDeployModel, k_order: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[PlannedShard, ...]:
    """The files of one rank; those of the others have the same headers."""
    outputs = [OutputTensor.of(key, *info) for key, info in rank_keys(model).items()]
    metadata = {"format": "np", "k_order": k_order, "producer": PRODUCER}
    return tuple(_with_metadata(s, metadata) for s in plan_shards(outputs, max_shard_bytes))


class Source(Protocol):
    """What parts are read from: a checkpoint, or one of which some tensors were trained."""

    @property
    def headers(self) -> Mapping[str, Any]:
        """Headers of all tensors by name."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""


def source_names(part: Part, source: Source) -> tuple[str, ...]:
    """Tensors of the source that a part without experts is made of."""
    if isinstance(part, Plain):
        name = source_name(part, source)
        return () if name is None else (name,)
    return tuple(part.sources)


def tensors_of(
    part: Part, source: Source, experts: Experts, ranks: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The keys of a part, for one rank after the other.

    Raises:
        ErnieQuantError: a tensor is missing or cannot be read.
        ValueError: ``experts`` gives something else than the format has.
    """
    if isinstance(part, Plain):
        name = source_name(part, source)
        tensor = None if name is None else source.tensor(name)
        for rank in range(ranks):
            yield {part.key: plain_to_rank(part, tensor, rank, ranks)}
    elif part.expert is not None:
        encoded = experts(*part.expert)
        for rank in range(ranks):
            yield _named(part, encoded_to_rank(part, encoded, rank, ranks))
    else:
        sources = [source.tensor(name) for name in part.sources]
        for rank in range(ranks):
            yield _named(part, wint8_to_rank(part, sources, rank, ranks))


def source_name(part: Plain, source: Source) -> str | None:
    """The original's name for a tensor; None if it is optional and absent."""
    if part.source in source.headers or not part.optional:
        return part.source
    other = Ernie45Moe.name_in_memory(part.source)
    return other if other in source.headers else None


def _named(part: Matrix, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{part.prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}


@contextmanager
def _removed_on_error(files: ShardFiles, root: Path) -> Iterator[ShardFiles]:
    """Wrap the writing of shards: if it fails, they and their rank's folder are deleted."""
    try:
        with files:
            yield files
    except BaseException:
        files.remove()
        delete(files.folder / INDEX_FILE)
        if files.folder != root:
            files.folder.rmdir()
        raise


def _with_metadata(shard: PlannedShard, metadata: Mapping[str, str]) -> PlannedShard:
    """The same file with other metadata in its header."""
    entries = json.loads(shard.header[8:])
    text = json.dumps({**entries, "__metadata__": metadata}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    longer = len(header) - len(shard.header)
    offsets = {name: offset + longer for name, offset in shard.offsets.items()}
    return PlannedShard(shard.file, header, shard.tensors, offsets, shard.n_bytes + longer)
