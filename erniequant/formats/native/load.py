"""Load a model for inference: quantised ones are checked first, plain ones load as they are."""

import copy
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.config import CONFIG_FILE, read_json
from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.data.tokenizers import has_tokenizer, load_tokenizer
from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.formats.fastdeploy.recognise import is_fastdeploy_folder
from erniequant.packing.header_check import QuantizedExperts, sound_if_quantized
from erniequant.system import resolve_device

# Models without a correction bias do not store it; transformers fills in zeros, which is right.
_OPTIONAL = "e_score_correction_bias"
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

    Args:
        source: folder or Hugging Face id.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        dtype: of activations and unquantised weights, for example "bfloat16"; None or "auto": as
            stored.
        keep_decoded: keep experts decoded after first use (see `PackedExperts`). None: on the CPU,
            when all of them fit in 2 GB.
        k_order: of a FastDeploy WINT2 checkpoint whose files do not say: "plain" or "mma64".
        reference: the original of such a checkpoint, to find its K order by.

    Returns:
        The transformers model, and the tokenizer or None if the checkpoint has none.

    Raises:
        ErnieQuantError: a tensor is missing, misplaced, truncated or of another type than the
            format says, the format version is unknown, or the device is not there.
    """
    target = resolve_device(device)
    if is_fastdeploy_folder(source):
        from erniequant.formats.fastdeploy.load import load_fastdeploy

        model = load_fastdeploy(source, target, resolve_dtype(dtype), k_order, reference)
        _keep_decoded(model, target, keep_decoded)
        folder = Path(model.name_or_path)
        return model.eval(), load_tokenizer(folder) if has_tokenizer(folder) else None
    checkpoint = open_checkpoint(source)
    require_no_adapter(checkpoint.folder)
    checkpoint.fetch()
    check = sound_if_quantized(checkpoint)
    layers = check.layers if check else ()
    model = _from_pretrained(checkpoint, layers, target, resolve_dtype(dtype))
    if layers:
        _keep_decoded(model, target, keep_decoded)
    folder = checkpoint.folder
    return model.eval(), load_tokenizer(folder) if has_tokenizer(folder) else None


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype, or "auto" for None and "auto".

    Raises:
        ErnieQuantError: nothing computes in it.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES:
        raise ErnieQuantError(f"no such dtype {dtype!r}; use bfloat16, float16 or float32")
    return found


def _from_pretrained(
    checkpoint: Checkpoint,
    layers: tuple[QuantizedExperts, ...],
    device: torch.device,
    dtype: torch.dtype | str,
) -> Any:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    from erniequant.integrations.transformers.plugin import register
    from erniequant.models.config_check import require_fit
    from erniequant.models.vl_config import MODEL_TYPE, in_terms_of_transformers

    register()
    folder, config = checkpoint.folder, checkpoint.config
    require_fit(config, checkpoint.headers, {layer.key for layer in layers})
    settings = in_terms_of_transformers(config)
    vision = settings["model_type"] == MODEL_TYPE
    auto: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    # transformers does not know the original's name of the architecture, nor take every null.
    as_stored = settings == read_json(folder / CONFIG_FILE)
    with foreign_errors(f"{folder / CONFIG_FILE} is not valid"):
        known = {} if as_stored else {"config": AutoConfig.for_model(**copy.deepcopy(settings))}
    with foreign_errors(f"transformers cannot load {folder}"):
        model, info = auto.from_pretrained(
            folder, dtype=dtype, output_loading_info=True,
            trust_remote_code=False, local_files_only=True, use_safetensors=True, **known,
        )  # fmt: skip
    missing = {name for name in info["missing_keys"] if _OPTIONAL not in name}
    for names, what in ((missing, "is missing"), (set(info["unexpected_keys"]), "is left over")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ErnieQuantError(f"{folder}: tensor {min(names)} {what}{more}")
    with foreign_errors(f"the model of {folder} cannot be moved to {device}"):
        return model.to(device)


def _keep_decoded(model: Any, device: torch.device, keep: bool | None) -> None:
    from erniequant.runtime.decoding_module import DecodingExperts

    packed = [m for m in model.modules() if isinstance(m, DecodingExperts)]
    if keep is None:
        weights = sum(m.weights for m in packed)
        keep = device.type == "cpu" and weights * model.dtype.itemsize <= _KEEP_DECODED_BYTES
    for module in packed:
        module.keep_decoded = keep
