"""The models that can be quantised, by the ``model_type`` of their config.json."""

from collections.abc import Callable
from typing import Any

from erniequant.checkpoint.config import quantized_by
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import Architecture
from erniequant.models.ernie45_dense import Ernie45Dense
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.models.ernie45_vl import Ernie45Vl
from erniequant.models.vl_config import ORIGINAL_MODEL_TYPE

ARCHITECTURES: dict[str, Callable[[dict[str, Any]], Architecture]] = {
    Ernie45Moe.model_type: Ernie45Moe,
    Ernie45Dense.model_type: Ernie45Dense,
    Ernie45Vl.model_type: Ernie45Vl,
    ORIGINAL_MODEL_TYPE: Ernie45Vl,
}


# Of transformers, by the model type that it reads.
_CLASSES = {
    Ernie45Moe.model_type: "Ernie4_5_MoeForCausalLM",
    Ernie45Dense.model_type: "Ernie4_5ForCausalLM",
    Ernie45Vl.model_type: "Ernie4_5_VLMoeForConditionalGeneration",
}


def with_stock_class(settings: dict[str, Any]) -> dict[str, Any]:
    """The same config.json, with transformers' own class where ``architectures`` names only others.

    These are of the checkpoint's code, which a result does not have.
    """
    import transformers

    named = settings.get("architectures")
    stock = _CLASSES.get(settings["model_type"])
    names = named if isinstance(named, list) else []
    if stock is None or not names or any(hasattr(transformers, str(name)) for name in names):
        return settings
    return settings | {"architectures": [stock]}


def architecture_of(settings: dict[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        ErnieQuantError: it is not supported, already quantised, or its settings are not valid.
    """
    found = settings.get("model_type")
    kind = ARCHITECTURES.get(found) if isinstance(found, str) else None
    if kind is None:
        known = ", ".join(ARCHITECTURES)
        raise ErnieQuantError(f"config.json says model_type {found!r}; supported: {known}")
    method = quantized_by(settings)
    if method is not None:
        ours = "erniequant" in method
        export = ", or export it first (erniequant export SRC NEW --to bf16)" if ours else ""
        raise ErnieQuantError(
            f"the source is already quantised (config.json has {method}); give the bf16 "
            f"checkpoint that it was made from{export}"
        )
    return kind(settings)
