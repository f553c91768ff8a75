"""The models that can be quantised, by the ``model_type`` of their config.json."""

from collections.abc import Callable
from typing import Any

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
    if "quantization_config" in settings:
        raise ErnieQuantError(
            "the source is already quantised (config.json has quantization_config); give the "
            "bf16 checkpoint"
        )
    return kind(settings)
