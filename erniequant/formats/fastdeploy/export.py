"""Export of a FastDeploy checkpoint to a plain transformers one, and detection of its K order."""

from pathlib import Path

import torch

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.folder import REPORT_FILE, left_behind, require_apart
from erniequant.checkpoint.reader import CONFIG_FILE, INDEX_FILE, Checkpoint, open_checkpoint
from erniequant.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from erniequant.data.companions import require_readable_companions, write_companions
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import EXPORT_DTYPES
from erniequant.formats.fastdeploy.config import K_ORDERS, plain_config
from erniequant.formats.fastdeploy.names import Matrix
from erniequant.formats.fastdeploy.reader import FastDeployCheckpoint, open_fastdeploy
from erniequant.formats.results import ExportReport
from erniequant.packing.file_check import file_states
from erniequant.paths import expanded

_LIKE = 0.5
"""Largest relative squared error of weights that are the original's: WINT2 has 0.1 to 0.2, and
weights in another order have 2."""


def export_bf16(
    src: str | Path,
    dst: str | Path,
    to: str = "bf16",
    *,
    k_order: str | None = None,
    reference: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportReport:
    """Decode the FastDeploy checkpoint ``src`` into the new folder ``dst``, under the names of the
    original.

    Args:
        to: "bf16" or "fp32"; fp32 also widens what is not quantised, so a model computing in
            float32 is reproduced exactly.
        k_order: K order of its WINT2 codes, if its files do not record it.
        reference: the original, from which the K order is detected if it is not known otherwise.

    Raises:
        ErnieQuantError: as `open_fastdeploy` and `detect_k_order`, or dst is not a new folder.
    """
    if to not in EXPORT_DTYPES:
        raise ErnieQuantError(f"cannot export to {to!r}; use {' or '.join(EXPORT_DTYPES)}")
    source = open_fastdeploy(src, k_order)
    require_no_adapter(source.folder)
    require_apart(source.folder, expanded(dst))
    require_readable_companions(source.folder)
    if source.k_order is None and reference is not None:
        source.k_order = detect_k_order(source, open_checkpoint(reference))
    for file, state in file_states(source.folder).items():
        if state != "ok":
            raise ErnieQuantError(
                f"{source.folder}: file {file} is missing or was changed: its sha256 is not that "
                "of the report; copy it again or run verify"
            )
    dtype = EXPORT_DTYPES[to]
    with CheckpointWriter(dst, max_shard_bytes) as writer:
        for name in source.names():
            tensor = source.tensor(name)
            if source.is_decoded(name) or tensor.dtype.itemsize < dtype.itemsize:
                tensor = tensor.to(dtype)
            writer.add(name, tensor)
        written = writer.finish()
        write_companions(source.folder, writer.folder)
        config = plain_config(source.config, str(dtype).removeprefix("torch."))
        write_json(writer.folder / CONFIG_FILE, config)
    left = left_behind(source.folder, {INDEX_FILE, REPORT_FILE, *source.files()})
    return ExportReport(str(dst), to, written.tensors, written.total_bytes, written.sha256, left)


def detect_k_order(source: FastDeployCheckpoint, original: Checkpoint) -> str:
    """The K order in which the first WINT2 matrix matches that of the original.

    Raises:
        ErnieQuantError: it matches in neither, so the original is another model; or there is no
            such matrix, and no order is needed.
    """
    parts = source.parts.values()
    part = next((p for p in parts if isinstance(p, Matrix) and p.format == "wint2"), None)
    if part is None:
        raise ErnieQuantError(f"{source.folder} has no WINT2 weights, so no k_order")
    errors = {order: _error(source, part, original, order) for order in K_ORDERS}
    best = min(errors, key=lambda order: errors[order])
    if not errors[best] < _LIKE:
        listed = ", ".join(f"{order} {error:.2f}" for order, error in errors.items())
        raise ErnieQuantError(
            f"{part.sources[0]} of {source.folder} matches that of the original in no k_order "
            f"(relative squared errors: {listed}); give the model that it was made from"
        )
    return best


def _error(source: FastDeployCheckpoint, part: Matrix, original: Checkpoint, k_order: str) -> float:
    decoded = source.decode(part, k_order)
    lost = energy = 0.0
    for name in part.sources:
        exact = original.tensor(name).float()
        if exact.shape != decoded[name].shape:
            raise ErnieQuantError(
                f"{name} of the original has shape {list(exact.shape)}, not "
                f"{list(decoded[name].shape)}"
            )
        lost += float((decoded[name] - exact).square().sum())
        energy += float(exact.square().sum())
    return lost / max(energy, torch.finfo(torch.float32).tiny)
