"""The families of models that can be quantised, by the ``model_type`` of their config.json.

What is particular to a family is in its own file; all others ask here. Importing this file does not
import transformers.
"""

from typing import Any

from erniequant.checkpoint.config import quantized_by
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import Architecture
from erniequant.models.ernie45_dense import Ernie45Dense
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.models.ernie45_vl import Ernie45Vl
from erniequant.models.images import ImageSettings
from erniequant.models.vl_config import ORIGINAL_MODEL_TYPE

FAMILIES: dict[str, type[Architecture]] = {
    Ernie45Moe.model_type: Ernie45Moe,
    Ernie45Dense.model_type: Ernie45Dense,
    Ernie45Vl.model_type: Ernie45Vl,
    ORIGINAL_MODEL_TYPE: Ernie45Vl,
}


def family_of(settings: dict[str, Any]) -> type[Architecture] | None:
    """The family that a config.json names, None if it is not one of `FAMILIES`."""
    name = settings.get("model_type")
    return FAMILIES.get(name) if isinstance(name, str) else None


def require_family(settings: dict[str, Any]) -> type[Architecture]:
    """`family_of`, raising ErnieQuantError where it is None."""
    family = family_of(settings)
    if family is None:
        raise ErnieQuantError(
            f"config.json says model_type {settings.get('model_type')!r}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return family


def stock_modules() -> dict[str, bool]:
    """Names of transformers' classes that packed modules replace; whether each is a dense MLP."""
    return {family.stock_module: family.is_dense() for family in FAMILIES.values()}


def _of_transformers(model_type: Any) -> type[Architecture] | None:
    """The family whose model type in transformers is this one."""
    family = family_of({"model_type": model_type})
    return family if family is not None and family.model_type == model_type else None


def with_stock_class(settings: dict[str, Any]) -> dict[str, Any]:
    """The same config.json, with transformers' own class where ``architectures`` names only others.

    The others come from the checkpoint's code, which a result does not have.
    """
    import transformers

    named = settings.get("architectures")
    family = _of_transformers(settings.get("model_type"))
    names = named if isinstance(named, list) else []
    if family is None or not names or any(hasattr(transformers, str(name)) for name in names):
        return settings
    return settings | {"architectures": [family.model_class]}


def image_settings(config: Any) -> ImageSettings | None:
    """Image settings of the model of a transformers config; None for a text-only model."""
    family = _of_transformers(config.model_type)
    return None if family is None else family.image_settings(config)


def architecture_of(settings: dict[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        ErnieQuantError: it is not supported, already quantised, or its settings are not valid.
    """
    family = require_family(settings)
    method = quantized_by(settings)
    if method is not None:
        ours = "erniequant" in method
        export = ", or export it first (erniequant export SRC NEW --to bf16)" if ours else ""
        raise ErnieQuantError(
            f"the source is already quantised (config.json has {method}); give the bf16 "
            f"checkpoint that it was made from{export}"
        )
    return family(settings)
