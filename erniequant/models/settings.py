"""Harmful values of a config.json that no checkpoint needs: numbers without bound, code or weights
from elsewhere. Refused before transformers sees them."""

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
_DTYPES = ("bfloat16", "float16", "float32")
_NAMES_WEIGHTS = ("transformers_weights", "gguf_file")


def require_harmless(settings: dict[str, Any]) -> None:
    """Look at every entry of a config.json, at any depth.

    Raises:
        ErnieQuantError: a number that is not finite or beyond all bounds, a type that nothing
            computes in, or a setting that names code or weights elsewhere.
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
        if key in ("dtype", "torch_dtype") and value not in (None, *_DTYPES):
            # Others load, but the stock products of experts do not take them.
            raise ErnieQuantError(f"config.json has {key} {value!r}; use {', '.join(_DTYPES)}")
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


def require_possible(config: Any) -> None:
    """Look at the sizes of a transformers config of a text model, mixture or dense.

    Raises:
        ErnieQuantError: they make no model.
    """
    for name in _POSITIVE + _NOT_NEGATIVE:
        if not hasattr(config, name) and name not in _ALWAYS:
            continue  # a dense model has no experts
        value = getattr(config, name, None)
        least = 1 if name in _POSITIVE else 0
        # Sizes of the text experts and of the vision experts.
        several = name == "moe_intermediate_size" and hasattr(config, "mlp_layer_types")
        numbers = value if several and isinstance(value, list) and len(value) == 2 else [value]
        if several and numbers is not value:
            raise ErnieQuantError(f"config.json has {name} {value!r}; expected two integers")
        if any(type(number) is not int or number < least for number in numbers):
            wanted = "a positive integer" if least else "an integer"
            raise ErnieQuantError(f"config.json has {name} {value!r}; expected {wanted}")
    floor = getattr(config, "moe_norm_min", 0.0)
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or floor < 0:
        raise ErnieQuantError(f"config.json has moe_norm_min {floor!r}; expected a small number")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", config.hidden_size // heads)
    if heads % groups or type(size) is not int or size < 2 or size % 2:
        raise ErnieQuantError(
            f"config.json has {heads} attention heads of size {size} for {groups} keys and values; "
            "heads must be a multiple of these and their size even"
        )
    if getattr(config, "moe_k", 0) > getattr(config, "moe_num_experts", 0):
        raise ErnieQuantError(
            f"config.json has moe_k {config.moe_k} of {config.moe_num_experts} experts"
        )


def require_possible_vision(config: Any) -> None:
    """Look at a transformers config of a vision-language model beyond its decoder.

    Raises:
        ErnieQuantError: it makes no model.
    """
    from transformers.activations import ACT2FN

    vision, text = config.vision_config, config.text_config
    for name in _VISION_SIZES:
        value = getattr(vision, name, None)
        if type(value) is not int or value < 1:
            raise ErnieQuantError(
                f"config.json has {name} {value!r} in vision_config; expected a positive integer"
            )
    if vision.hidden_size % vision.num_heads or vision.hidden_size // vision.num_heads % 4:
        raise ErnieQuantError(
            f"config.json has {vision.num_heads} heads for {vision.hidden_size} channels in "
            "vision_config; their size must be a multiple of 4"
        )
    if vision.temporal_merge_size != 2:
        raise ErnieQuantError(
            f"config.json has temporal_merge_size {vision.temporal_merge_size}; transformers runs "
            "2 only"
        )
    if vision.hidden_act not in ACT2FN:
        raise ErnieQuantError(f"config.json has hidden_act {vision.hidden_act!r}; unknown")
    layers, kinds = text.num_hidden_layers, text.mlp_layer_types
    if len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
        raise ErnieQuantError(
            f"config.json has mlp_layer_types of length {len(kinds)}; expected dense or sparse for "
            f"each of {layers} layers"
        )
    half = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads) // 2
    section = text.rope_parameters.get("mrope_section", [22, 22, 20])
    # Frequencies of height and width alternate.
    numbers = isinstance(section, list) and all(type(n) is int for n in section)
    sound = numbers and len(section) == 3 and section[0] == section[1]
    if not sound or sum(section) != half or not 0 < section[2] < half:
        raise ErnieQuantError(
            f"config.json has mrope_section {section!r}; expected [n, n, m] with a sum of {half}"
        )
    ids = [getattr(config, name) for name in _TOKEN_IDS]
    whole = all(type(number) is int and 0 <= number < text.vocab_size for number in ids)
    if not whole or len(set(ids)) != len(ids):
        raise ErnieQuantError(
            f"config.json has {', '.join(_TOKEN_IDS)} {ids}; expected different ids below "
            f"{text.vocab_size}"
        )


_VISION_SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels",
                 "patch_size", "spatial_merge_size")  # fmt: skip
_TOKEN_IDS = ("image_token_id", "image_start_token_id", "image_end_token_id")
_ALWAYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_POSITIVE = (*_ALWAYS, "moe_num_experts", "moe_intermediate_size", "moe_k", "moe_layer_interval")
_NOT_NEGATIVE = ("moe_layer_start_index", "moe_layer_end_index", "moe_num_shared_experts")
