"""Writes a checkpoint for FastDeploy with experts that are encoded already: made-up ones, where
`erniequant.quantize` encodes its own."""

from pathlib import Path

from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.reader import CONFIG_FILE, Checkpoint
from erniequant.checkpoint.writer import MAX_SHARD_BYTES
from erniequant.data.companions import write_companions
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.config import DEFAULT_K_ORDER, choose_k_order, fastdeploy_config
from erniequant.formats.fastdeploy.names import Plain, parts_of
from erniequant.formats.fastdeploy.sizes import (
    NO_WINT4,
    FastDeployModel,
    fastdeploy_model,
    text_moe,
)
from erniequant.formats.fastdeploy.writer import (
    Experts,
    source_name,
    tensors_of,
    write_parts,
    written,
)
from erniequant.formats.results import WrittenShards
from erniequant.models.config_check import tensor_misfits
from erniequant.paths import expanded


def write_fastdeploy(
    source: Checkpoint,
    folder: Path,
    experts: Experts,
    *,
    w4_end_layer: int = NO_WINT4,
    k_order: str = DEFAULT_K_ORDER,
    tensor_parallel: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> WrittenShards:
    """Write ``source`` into a new folder for FastDeploy.

    Args:
        source: the original, with one tensor per matrix of an expert.
        experts: gives every encoded matrix of an expert.
        w4_end_layer: last layer whose experts are wint4.
        k_order: of the WINT2 codes that ``experts`` gives; recorded, not checked.
        tensor_parallel: ranks to cut for; more than one makes folders rank0, rank1...

    Raises:
        ErnieQuantError: the original is not a text MoE that FastDeploy can serve, a tensor is
            missing or unknown, the folder is not new, or the disk refuses.
        ValueError: ``experts`` gives something else than the format has.
    """
    choose_k_order(None, k_order)
    folder = expanded(folder)
    architecture = text_moe(source.config)
    model = fastdeploy_model(architecture, w4_end_layer, tensor_parallel)
    for line in tensor_misfits(architecture, source.headers):
        raise ErnieQuantError(line)
    digests = write_parts(
        folder,
        model,
        k_order,
        lambda part: tensors_of(part, source, experts, tensor_parallel),
        max_shard_bytes,
    )
    write_companions(source.folder, folder)
    config = fastdeploy_config(source.config, architecture, model, k_order)
    write_json(folder / CONFIG_FILE, config)
    return written(folder, model, digests, _left_out(source, model))


def _left_out(source: Checkpoint, model: FastDeployModel) -> tuple[str, ...]:
    used: set[str | None] = set()
    for part in parts_of(model):
        used |= {source_name(part, source)} if isinstance(part, Plain) else set(part.sources)
    return tuple(name for name in source.names() if name not in used)
