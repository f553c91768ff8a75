"""Load a model for inference: quantised ones are checked first, plain ones load as they are."""

import copy
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.config import CONFIG_FILE, read_json
from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.models.header_check import QuantizedExperts, sound_if_quantized


def load_native(
    source: str | Path, device: torch.device, dtype: torch.dtype | str
) -> tuple[Any, Path]:
    """The model of a quantised or plain checkpoint, and its folder; see `erniequant.load`."""
    checkpoint = open_checkpoint(source)
    require_no_adapter(checkpoint.folder)
    checkpoint.fetch()
    check = sound_if_quantized(checkpoint)
    layers = check.layers if check else ()
    return _from_pretrained(checkpoint, layers, device, dtype), checkpoint.folder


def _from_pretrained(
    checkpoint: Checkpoint,
    layers: tuple[QuantizedExperts, ...],
    device: torch.device,
    dtype: torch.dtype | str,
) -> Any:
    import transformers

    from erniequant.integrations.transformers.plugin import register
    from erniequant.models.config_check import require_fit
    from erniequant.models.registry import require_family

    register()
    folder, config = checkpoint.folder, checkpoint.config
    require_fit(config, checkpoint.headers, {layer.key for layer in layers})
    family = require_family(config)
    settings = family.in_terms_of_transformers(config)
    auto: Any = getattr(transformers, family.auto_class)
    # transformers neither knows the original's name of the architecture nor accepts every null.
    as_stored = settings == read_json(folder / CONFIG_FILE)
    with wrap_errors(f"{folder / CONFIG_FILE} is not valid"):
        own_config = (
            {}
            if as_stored
            else {"config": transformers.AutoConfig.for_model(**copy.deepcopy(settings))}
        )
    with wrap_errors(f"transformers cannot load {folder}"):
        model, info = auto.from_pretrained(
            folder, dtype=dtype, output_loading_info=True,
            trust_remote_code=False, local_files_only=True, use_safetensors=True, **own_config,
        )  # fmt: skip
    # transformers fills in zeros, which is right.
    missing = {name for name in info["missing_keys"] if not family.optional(name)}
    for names, what in ((missing, "is missing"), (set(info["unexpected_keys"]), "is left over")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ErnieQuantError(f"{folder}: tensor {min(names)} {what}{more}")
    with wrap_errors(f"the model of {folder} cannot be moved to {device}"):
        return model.to(device)
