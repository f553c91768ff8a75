"""Load a model for inference: quantised ones are checked first, plain ones load as they are."""

from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.devices import resolve_device
from erniequant.errors import ErnieQuantError
from erniequant.format.headers import is_quantized, require_sound

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# Models without a correction bias do not store it; transformers fills in zeros, which is right.
_OPTIONAL = "e_score_correction_bias"
_KEEP_DECODED_BYTES = 2_000_000_000


def load(
    source: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    *,
    keep_decoded: bool | None = None,
) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer of a quantised or plain checkpoint.

    Args:
        source: folder or Hugging Face id.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        dtype: of activations and unquantised weights, for example "bfloat16"; None: as stored.
        keep_decoded: keep experts decoded after first use (see `PackedExperts`). None: on the CPU,
            when all of them fit in 2 GB.

    Returns:
        The transformers model, and the tokenizer or None if the checkpoint has none.

    Raises:
        ErnieQuantError: a tensor is missing, misplaced, truncated or of another type than the
            format says, the format version is unknown, or the device is not there.
    """
    checkpoint = open_checkpoint(source)
    quantized = is_quantized(checkpoint.config)
    if quantized:
        require_sound(checkpoint)
    target = resolve_device(device)
    model = _from_pretrained(checkpoint, target, resolve_dtype(dtype))
    if quantized:
        _keep_decoded(model, target, keep_decoded)
    return model.eval(), _tokenizer(checkpoint.folder)


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype, or "auto" for None. Raises ErnieQuantError for anything but a float type."""
    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ErnieQuantError(f"no such dtype {dtype!r}; use bfloat16, float16 or float32")
    return found


def _from_pretrained(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from erniequant.runtime.transformers_plugin import register

    register()
    vision = "vision_config" in checkpoint.config
    auto: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(checkpoint.folder, dtype=dtype, output_loading_info=True)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise ErnieQuantError(
            f"transformers cannot load {checkpoint.folder}: {reason[0] if reason else error!r}"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if _OPTIONAL not in name)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ErnieQuantError(f"{checkpoint.folder}: tensor {missing[0]} is missing{more}")
    return model.to(device)


def _keep_decoded(model: Any, device: torch.device, keep: bool | None) -> None:
    from erniequant.runtime.experts import PackedExperts

    packed = [m for m in model.modules() if isinstance(m, PackedExperts)]
    if keep is None:
        weights = sum(3 * m.num_experts * m.hidden_dim * m.intermediate_dim for m in packed)
        keep = device.type == "cpu" and weights * model.dtype.itemsize <= _KEEP_DECODED_BYTES
    for module in packed:
        module.keep_decoded = keep


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError) as error:
        raise ErnieQuantError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
