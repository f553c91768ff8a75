"""Keys of quantised layers, and the places in a model that they stand for.

These places belong to the format: a reader refuses a key that it does not know, so another one
needs another version (docs/format.md). A family of models says which of them it has.
"""

import re
from dataclasses import dataclass

from erniequant.errors import ErnieQuantError

GUARD = "down_proj"
"""A one-element tensor with a stock parameter's name: its size stops a load without our plugin.

`guard_name` gives the name for any layer; this is that of routed experts.
"""


@dataclass(frozen=True)
class Slot:
    """A place in a decoder layer that takes packed tensors.

    Attributes:
        name: follows the layer's index and a dot in a layer key; a key without it has no dot.
        module: path within the layer.
        dense: it is the MLP of a dense model, stored as one expert.
    """

    name: str
    module: str
    dense: bool = False


EXPERTS = Slot("", "mlp.experts")
TEXT_EXPERTS = Slot("text_moe", "mlp.text_moe.experts")
VISION_EXPERTS = Slot("vision_moe", "mlp.vision_moe.experts")
MLP = Slot("mlp", "mlp", dense=True)
SLOTS = {slot.name: slot for slot in (EXPERTS, TEXT_EXPERTS, VISION_EXPERTS, MLP)}
"""All slots that a layer key can name."""

_INDEX = "[0-9]{1,9}"
_LAYER_KEY = re.compile(rf"({_INDEX})(?:\.({'|'.join(filter(None, SLOTS))}))?")
_PATHS = [
    (slot, re.compile(rf"(?:^|\.)layers\.({_INDEX})\.{re.escape(slot.module)}(?:\.|$)"))
    for slot in SLOTS.values()
]


def is_layer_key(text: str) -> bool:
    """True if a text is a layer key of this version of the format."""
    return _LAYER_KEY.fullmatch(text) is not None


def slot_of(layer_key: str) -> Slot:
    """The slot that a layer key names.

    Raises:
        ErnieQuantError: not a layer key.
    """
    return _parts(layer_key)[1]


def is_dense_key(layer_key: str) -> bool:
    """True if a layer key means the MLP of a dense model: ``3.mlp``."""
    return is_layer_key(layer_key) and slot_of(layer_key).dense


def guard_name(layer_key: str) -> str:
    """Name of a layer's guard after its prefix: ``down_proj``, of an MLP ``down_proj.weight``."""
    return f"{GUARD}.weight" if is_dense_key(layer_key) else GUARD


def experts_module(layer_key: str) -> str:
    """Module path of what takes the packed tensors, without the model's own prefix.

    ``layers.3.mlp.experts`` for key ``3``, ``layers.3.mlp`` for key ``3.mlp``.

    Raises:
        ErnieQuantError: not a layer key.
    """
    index, slot = _parts(layer_key)
    return f"layers.{index}.{slot.module}"


def layer_key_of(module_path: str, dense: bool = False) -> str | None:
    """Layer key of a module or tensor path; None when it is not inside routed experts.

    dense: the path is of a dense model, where the MLP takes the place of the experts. Names alone
    do not tell: the first layers of a mixture-of-experts model have the same, and are never packed.
    """
    for slot, path in _PATHS:
        match = path.search(module_path) if slot.dense == dense else None
        if match is not None:
            return f"{match[1]}.{slot.name}" if slot.name else match[1]
    return None


def _parts(layer_key: str) -> tuple[str, Slot]:
    match = _LAYER_KEY.fullmatch(layer_key)
    if match is None:
        raise ErnieQuantError(f"{layer_key!r} is not a layer index")
    return match[1], SLOTS[match[2] or ""]
