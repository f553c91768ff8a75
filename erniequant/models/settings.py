"""Values of a config.json that no checkpoint needs and that do harm: numbers without bound, code or
weights from elsewhere. Looked at before transformers sees them."""

import math
from collections.abc import Iterator
from typing import Any

from erniequant.errors import ErnieQuantError

# Token ids and positions; no published one comes near.
_MAX_NUMBER = 2**40
# transformers makes a name for every label.
_MAX_LABELS = 2**16
_NAMES_CODE = (
    "attn_implementation", "_attn_implementation", "experts_implementation",
    "_experts_implementation",
)  # fmt: skip
_NAMES_WEIGHTS = ("transformers_weights", "gguf_file")


def require_harmless(settings: dict[str, Any]) -> None:
    """Look at every entry of a config.json, at any depth.

    Raises:
        ErnieQuantError: a number that is not finite or beyond all bounds, or a setting that names
            code or weights elsewhere.
    """
    for key, value in entries(settings):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ErnieQuantError(f"config.json has {key} {number}; give a finite number")
            limit = _MAX_LABELS if key == "num_labels" else _MAX_NUMBER
            if isinstance(number, (int, float)) and abs(number) > limit:
                raise ErnieQuantError(f"config.json has {key} {str(number)[:40]}; at most {limit}")
        if key in _NAMES_CODE and not (value is None or _is_plain_word(value)):
            # A name with a slash is fetched from the hub, and run.
            raise ErnieQuantError(
                f"config.json has {key} {value!r}: code from elsewhere; remove it"
            )
        if key in _NAMES_WEIGHTS and value is not None:
            raise ErnieQuantError(f"config.json has {key} {value!r}: other weights; remove it")
        if key == "return_dict" and value is not True:
            # The stock modules do not run with tuples in place of their outputs.
            raise ErnieQuantError(f"config.json has return_dict {value!r}; remove it")


def entries(settings: Any) -> Iterator[tuple[str, Any]]:
    """Every key and its value, of nested objects too; what reads them must bound their depth."""
    for child in settings.values() if isinstance(settings, dict) else settings:
        if isinstance(child, (dict, list)):
            yield from entries(child)
    if isinstance(settings, dict):
        yield from settings.items()


def _is_plain_word(value: Any) -> bool:
    return isinstance(value, str) and "/" not in value and ":" not in value
