"""Write a quantised checkpoint as a plain one that stock transformers loads.

Experts are decoded one at a time and stored under the names of the original (one tensor per expert
and matrix); everything else is copied. Memory: one expert and one shard.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.folder import REPORT_FILE, left_behind, require_apart
from erniequant.checkpoint.reader import CONFIG_FILE, INDEX_FILE, open_checkpoint
from erniequant.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from erniequant.data.companions import require_readable_companions, write_companions
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.recognise import is_fastdeploy_folder
from erniequant.models.config_check import require_fit
from erniequant.models.registry import with_stock_class
from erniequant.packing.decoding import expert_matrices
from erniequant.packing.file_check import require_as_reported
from erniequant.packing.header_check import kept_names, require_sound
from erniequant.paths import expanded

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExportReport:
    """What was written; ``left_behind`` names what else is in the source's folder."""

    folder: str
    to: str
    tensors: int
    total_bytes: int
    sha256: dict[str, str]
    left_behind: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def export(
    src: str | Path,
    dst: str | Path,
    to: str = "bf16",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    k_order: str | None = None,
    reference: str | Path | None = None,
) -> ExportReport:
    """Decode the experts of ``src`` (folder or Hugging Face id) into the new folder ``dst``.

    Args:
        to: "bf16" or "fp32"; fp32 also widens the tensors that are copied, so that a model
            computing in float32 is reproduced exactly.
        k_order: of a FastDeploy WINT2 checkpoint whose files do not say: "plain" or "mma64".
        reference: the original of such a checkpoint, to find its K order by.

    Raises:
        ErnieQuantError: src is not a sound quantised checkpoint, its files are not those that its
            report lists, or dst is not a new folder.
    """
    if to not in DTYPES:
        raise ErnieQuantError(f"cannot export to {to!r}; use {' or '.join(DTYPES)}")
    if is_fastdeploy_folder(src):
        from erniequant.formats.fastdeploy.export import export_bf16

        return export_bf16(
            src, dst, to, k_order=k_order, reference=reference, max_shard_bytes=max_shard_bytes
        )
    source = open_checkpoint(src)
    require_no_adapter(source.folder)
    require_apart(source.folder, expanded(dst))
    require_readable_companions(source.folder)
    source.fetch()
    check = require_sound(source)
    require_as_reported(source, check)
    require_fit(source.config, source.headers, {layer.key for layer in check.layers})
    dtype = DTYPES[to]
    with CheckpointWriter(dst, max_shard_bytes) as writer:
        for name in kept_names(source, check.layers):
            writer.add(name, _widened(source.tensor(name), dtype))
        for layer in check.layers:
            for name, weight in expert_matrices(source, layer):
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
