"""Write a quantised checkpoint as a plain one that stock transformers loads.

Experts are decoded one at a time and stored under the names of the original (one tensor per expert
and matrix); everything else is copied. Memory: one expert and one shard.
"""

from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.folder import REPORT_FILE, left_behind, require_apart
from erniequant.checkpoint.reader import CONFIG_FILE, INDEX_FILE, open_checkpoint
from erniequant.checkpoint.writer import CheckpointWriter
from erniequant.data.companions import require_readable_companions, write_companions
from erniequant.formats.base import EXPORT_DTYPES
from erniequant.formats.results import ExportReport
from erniequant.models.config_check import require_fit
from erniequant.models.header_check import kept_names, require_sound
from erniequant.models.registry import with_stock_class
from erniequant.packing.decoding import expert_matrices
from erniequant.packing.file_check import require_as_reported
from erniequant.paths import expanded
from erniequant.runtime.decoding import decode_fast


def export_native(src: str | Path, dst: str | Path, to: str, max_shard_bytes: int) -> ExportReport:
    """See `erniequant.export`."""
    source = open_checkpoint(src)
    require_no_adapter(source.folder)
    require_apart(source.folder, expanded(dst))
    require_readable_companions(source.folder)
    source.fetch()
    check = require_sound(source)
    require_as_reported(source, check)
    require_fit(source.config, source.headers, {layer.key for layer in check.layers})
    dtype = EXPORT_DTYPES[to]
    with CheckpointWriter(dst, max_shard_bytes) as writer:
        for name in kept_names(source, check.layers):
            writer.add(name, _widened(source.tensor(name), dtype))
        for layer in check.layers:
            for name, weight in expert_matrices(source, layer, decode_fast):
                writer.add(name, weight.to(dtype))
        written = writer.finish()
        write_companions(source.folder, writer.folder)
        write_json(writer.folder / CONFIG_FILE, _plain_config(source.config, dtype))
    left = left_behind(source.folder, {INDEX_FILE, REPORT_FILE, *source.shards})
    return ExportReport(str(dst), to, written.tensors, written.total_bytes, written.sha256, left)


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrower = tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
    return tensor.to(dtype) if narrower else tensor


def _plain_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    settings = with_stock_class(config)
    plain = {k: v for k, v in settings.items() if k not in ("quantization_config", "torch_dtype")}
    plain["dtype"] = str(dtype).removeprefix("torch.")
    return plain
