"""The verbs for a checkpoint of any format: load, inspect, verify, export. Its format does them."""

from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.writer import MAX_SHARD_BYTES
from erniequant.data.tokenizers import has_tokenizer, load_tokenizer
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import EXPORT_DTYPES, ReadOptions
from erniequant.formats.registry import format_of, get_format
from erniequant.formats.results import ExportReport, ModelSummary, VerifyReport, WrittenShards
from erniequant.system import resolve_device

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_KEEP_DECODED_BYTES = 2_000_000_000


def load(
    source: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    *,
    keep_decoded: bool | None = None,
    k_order: str | None = None,
    reference: str | Path | None = None,
) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer of a quantised or plain checkpoint.

    On the CPU, linear layers multiply few tokens by compiled code (`runtime.linear`).

    Args:
        source: folder or Hugging Face id.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        dtype: type of activations and unquantised weights, for example "bfloat16"; None or "auto":
            as stored.
        keep_decoded: keep experts decoded after first use (see `DecodingExperts`). None: on the
            CPU, those that cannot be multiplied packed, if they fit in 2 GB.
        k_order: K order of a FastDeploy WINT2 checkpoint, if its files do not record it: "plain" or
            "mma64".
        reference: the original of such a checkpoint, from which its K order is detected.

    Returns:
        The transformers model, and the tokenizer or None if the checkpoint has none.

    Raises:
        ErnieQuantError: a tensor is missing, misplaced, truncated or of another type than the
            format says, the format version is unknown, or the device is not there.
    """
    target = resolve_device(device)
    model, folder = format_of(source).load(
        source, target, resolve_dtype(dtype), ReadOptions(k_order, reference)
    )
    from erniequant.runtime.linear import quicken

    _keep_decoded(model, target, keep_decoded)
    quicken(model)
    return model.eval(), load_tokenizer(folder) if has_tokenizer(folder) else None


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype, or "auto" for None and "auto".

    Raises:
        ErnieQuantError: nothing computes in it.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or torch_dtype not in _DTYPES:
        raise ErnieQuantError(f"no such dtype {dtype!r}; use bfloat16, float16 or float32")
    return torch_dtype


def inspect(source: str | Path) -> ModelSummary:
    """Summary of a quantised or plain checkpoint, given by folder or Hugging Face id.

    Raises:
        ErnieQuantError: it cannot be read, or contradicts its own config.json.
    """
    return format_of(source).inspect(source)


def verify(model_dir: str | Path, reference: str | Path | None = None) -> VerifyReport:
    """Check a quantised checkpoint, against its original when given (folders or Hugging Face ids).

    Raises:
        ErnieQuantError: it cannot be read at all: no weights, truncated shards, not quantised.
    """
    return format_of(model_dir).verify(model_dir, reference)


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
        k_order: K order of a FastDeploy WINT2 checkpoint, if its files do not record it: "plain" or
            "mma64".
        reference: the original of such a checkpoint, from which its K order is detected.

    Raises:
        ErnieQuantError: src is not a sound quantised checkpoint, its files are not those that its
            report lists, or dst is not a new folder.
    """
    if to not in EXPORT_DTYPES:
        raise ErnieQuantError(f"cannot export to {to!r}; use {' or '.join(EXPORT_DTYPES)}")
    read = ReadOptions(k_order, reference)
    return format_of(src).export(src, dst, to, read, max_shard_bytes)


def reshard(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    tensor_parallel: int = 1,
    k_order: str | None = None,
) -> WrittenShards:
    """Write ``src``, a checkpoint of the format ``to``, into the new folder ``dst``, cut for
    ``tensor_parallel`` ranks. No weight changes.

    Raises:
        ErnieQuantError: it is of another format, cut already, or cannot be cut so.
    """
    wanted = get_format(to)
    if format_of(src) is not wanted:
        raise ErnieQuantError(
            f"{src} was not quantised for {wanted.title}; make it from the original: erniequant "
            f"quantize SRC DST --bits 2 --format {to}"
        )
    return wanted.reshard(src, dst, tensor_parallel, ReadOptions(k_order))


def _keep_decoded(model: Any, device: torch.device, keep: bool | None) -> None:
    from erniequant.runtime.decoding_module import DecodingExperts

    packed = [m for m in model.modules() if isinstance(m, DecodingExperts)]
    if keep is None:
        decoding = [m for m in packed if not m.multiplies_packed(device, model.dtype)]
        size = sum(m.weights for m in decoding) * model.dtype.itemsize
        packed = decoding if device.type == "cpu" and size <= _KEEP_DECODED_BYTES else []
    for module in packed:
        module.keep_decoded = keep is None or keep
