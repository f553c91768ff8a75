"""Cut a FastDeploy checkpoint for more ranks: the same codes and scales, so the same weights."""

from collections.abc import Iterator
from pathlib import Path

import torch

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.folder import require_apart
from erniequant.checkpoint.reader import CONFIG_FILE
from erniequant.data.companions import require_readable_companions, write_companions
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.config import fastdeploy_config
from erniequant.formats.fastdeploy.convert import encoded_to_rank, plain_to_rank
from erniequant.formats.fastdeploy.names import Part, Plain
from erniequant.formats.fastdeploy.reader import open_fastdeploy
from erniequant.formats.fastdeploy.sizes import fastdeploy_model, text_moe
from erniequant.formats.fastdeploy.writer import write_parts, written
from erniequant.formats.results import WrittenShards
from erniequant.paths import expanded


def reshard(
    src: str | Path, dst: str | Path, *, tensor_parallel: int, k_order: str | None = None
) -> WrittenShards:
    """Write ``src``, which is whole, into the new folder ``dst``, cut for several ranks.

    Args:
        k_order: K order of WINT2, if the files do not record it.

    Raises:
        ErnieQuantError: ``src`` is cut already, nobody knows its K order, a size does not divide,
            or the disk refuses.
    """
    source = open_fastdeploy(src, k_order)
    require_no_adapter(source.folder)
    require_apart(source.folder, expanded(dst))
    require_readable_companions(source.folder)
    if len(source.ranks) > 1:
        raise ErnieQuantError(
            f"{src} is cut for {len(source.ranks)} ranks already; give the one that is not cut"
        )
    if source.k_order is None:
        raise ErnieQuantError(
            f"{src} does not say which k_order it has; give --k-order (mma64 since July 2025)"
        )
    whole = source.ranks[0]
    architecture = text_moe(source.config)
    model = fastdeploy_model(architecture, source.settings.w4_end_layer, tensor_parallel)

    def tensors(part: Part) -> Iterator[dict[str, torch.Tensor]]:
        if isinstance(part, Plain):
            present = part.key in whole.headers
            tensor = source.tensor(part.source) if present else None
            for rank in range(tensor_parallel):
                yield {part.key: plain_to_rank(part, tensor, rank, tensor_parallel)}
            return
        encoded = source.keys_of(part, whole)
        for rank in range(tensor_parallel):
            cut = encoded_to_rank(part, encoded, rank, tensor_parallel)
            yield {f"{part.prefix}.{suffix}": tensor for suffix, tensor in cut.items()}

    folder = expanded(dst)
    digests = write_parts(folder, model, source.k_order, tensors)
    write_companions(source.folder, folder)
    config = fastdeploy_config(source.config, architecture, model, source.k_order)
    write_json(folder / CONFIG_FILE, config)
    return written(folder, model, digests)
