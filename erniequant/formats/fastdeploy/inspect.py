"""Say what a FastDeploy checkpoint holds, from headers alone."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from erniequant.formats.fastdeploy.names import Matrix, Part, Plain
from erniequant.formats.fastdeploy.reader import FastDeployCheckpoint, open_fastdeploy
from erniequant.formats.folder_checks import folder_notes, provenance
from erniequant.formats.results import ModelSummary, TensorSummary


def inspect_fastdeploy(source: str | Path) -> ModelSummary:
    """Summary of a FastDeploy checkpoint; tensors of rank folders are listed by rank.

    Raises:
        ErnieQuantError: it cannot be read, or lacks what FastDeploy asks for.
    """
    opened = open_fastdeploy(source)
    parts = list(dict.fromkeys(opened.parts.values()))
    tensors = tuple(_tensors(opened, parts))
    experts = [part for part in parts if isinstance(part, Matrix) and part.expert is not None]
    prefixes = {part.prefix for part in experts}
    expert_bytes = sum(
        tensor.n_bytes for tensor in tensors if _key(tensor).rpartition(".")[0] in prefixes
    )
    layers = Counter({(p.expert[0], p.format) for p in experts if p.expert is not None})
    formats = Counter(name for _, name in layers)
    return ModelSummary(
        folder=str(opened.folder),
        model_type=f"{opened.config['model_type']}, for FastDeploy",
        format_version=None,
        producer=opened.settings.producer,
        quantized_layers=tuple(str(layer) for layer, _ in sorted(layers)),
        codes={
            f"experts: {name}" + (f", k_order {opened.k_order}" if name == "wint2" else ""): count
            for name, count in sorted(formats.items())
        },
        expert_weights=sum(sum(part.outputs) * part.inputs for part in experts),
        expert_bytes=expert_bytes,
        total_weights=sum(map(_weights, parts)),
        total_bytes=sum(tensor.n_bytes for tensor in tensors),
        provenance=provenance(opened.folder),
        tensors=tensors,
        notes=folder_notes(opened.folder),
    )


def _tensors(opened: FastDeployCheckpoint, parts: list[Part]) -> Iterator[TensorSummary]:
    several = len(opened.ranks) > 1
    for number, rank in enumerate(opened.ranks):
        for part in parts:
            for key in part.key_names():
                header = rank.headers.get(key)
                if header is not None:
                    yield TensorSummary(
                        f"rank{number}/{key}" if several else key,
                        header.shape,
                        header.stored_dtype,
                        header.n_bytes,
                        header.shard,
                        None if isinstance(part, Plain) else part.format,
                    )


def _key(tensor: TensorSummary) -> str:
    return tensor.name.rpartition("/")[2]


def _weights(part: Part) -> int:
    if isinstance(part, Plain):
        return math.prod(part.shape)
    return sum(part.outputs) * part.inputs
