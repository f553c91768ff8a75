"""Baidu's own config.json of vision-language models, translated into that of transformers.

The released checkpoints say ``ernie4_5_moe_vl`` and bring code of their own; transformers knows the
same weights as ``ernie4_5_vl_moe``. What it calls what is in `docs/format.md`.
"""

from typing import Any

from erniequant.errors import ErnieQuantError, wrap_errors

ORIGINAL_MODEL_TYPE = "ernie4_5_moe_vl"
MODEL_TYPE = "ernie4_5_vl_moe"
MODEL_CLASS = "Ernie4_5_VLMoeForConditionalGeneration"

# Baidu's defaults for these are not transformers', so they have to be there.
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "rms_norm_eps", "moe_k")  # fmt: skip
_OPTIONAL = ("max_position_embeddings", "head_dim", "moe_norm_min", "initializer_range",
             "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
_VISION_REQUIRED = ("depth", "hidden_size", "num_heads", "patch_size")
_VISION_OPTIONAL = ("hidden_act", "in_channels")
# Ids of the released tokenizer, which the original config leaves to it.
_KEPT = ("image_start_token_id", "image_end_token_id", "video_start_token_id",
         "video_end_token_id", "video_token_id", "quantization_config")  # fmt: skip
# Rotations of a head that turn with time; height and width share the rest.
_TIME_FREQUENCIES = 20


def in_terms_of_transformers(settings: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers reads; one of its own is returned as it is.

    Raises:
        ErnieQuantError: the original lacks an entry, or describes what transformers does not run.
    """
    if settings.get("model_type") != ORIGINAL_MODEL_TYPE:
        return settings
    with wrap_errors(f"config.json is not a valid {ORIGINAL_MODEL_TYPE} config"):
        return {
            "architectures": [MODEL_CLASS],
            "model_type": MODEL_TYPE,
            "dtype": settings.get("dtype") or settings.get("torch_dtype") or "bfloat16",
            "tie_word_embeddings": settings.get("tie_word_embeddings", True),
            "image_token_id": _entry(settings, "im_patch_id"),
            "text_config": _text(settings),
            "vision_config": _vision(settings),
            **{name: settings[name] for name in _KEPT if name in settings},
        }


def _text(settings: dict[str, Any]) -> dict[str, Any]:
    heads, layers = _count(settings, "num_attention_heads"), _count(settings, "num_hidden_layers")
    given = settings.get("head_dim")
    size = _count(settings, "hidden_size") // heads if given is None else given
    time = settings.get("freq_allocation", _TIME_FREQUENCIES)
    if type(size) is not int or type(time) is not int or settings.get("rope_3d", True) is not True:
        raise ErnieQuantError(
            f"config.json has rope_3d {settings.get('rope_3d')!r}, head_dim {given!r} and "
            f"freq_allocation {time!r}; expected true and integers"
        )
    plane = (size // 2 - time) // 2
    groups = settings.get("num_key_value_heads")
    return {
        **{name: _entry(settings, name) for name in _REQUIRED},
        **{name: settings[name] for name in _OPTIONAL if settings.get(name) is not None},
        "model_type": f"{MODEL_TYPE}_text",
        "num_key_value_heads": heads if groups is None else groups,
        "hidden_act": settings.get("hidden_act", "silu"),
        "use_bias": settings.get("use_bias", False),
        "tie_word_embeddings": settings.get("tie_word_embeddings", True),
        "moe_intermediate_size": _pair(settings, "moe_intermediate_size"),
        "moe_num_experts": _same(settings, "moe_num_experts"),
        "moe_num_shared_experts": settings.get("moe_num_shared_experts") or 0,
        "mlp_layer_types": _layer_types(settings, layers),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _entry(settings, "rope_theta"),
            "mrope_section": [plane, plane, time],
        },
    }


def _vision(settings: dict[str, Any]) -> dict[str, Any]:
    original = _entry(settings, "vision_config")
    if not isinstance(original, dict):
        raise ErnieQuantError(f"config.json has vision_config {original!r}; expected an object")
    ratio = original.get("mlp_ratio", 4)
    if not isinstance(ratio, (int, float)):
        raise ErnieQuantError(f"config.json has mlp_ratio {ratio!r}; expected a number")
    return {
        **{name: _entry(original, name, " in vision_config") for name in _VISION_REQUIRED},
        **{name: original[name] for name in _VISION_OPTIONAL if name in original},
        "model_type": f"{MODEL_TYPE}_vision",
        "intermediate_size": int(_count(original, "hidden_size") * ratio),
        "spatial_merge_size": settings.get(
            "spatial_conv_size", original.get("spatial_merge_size", 2)
        ),
        "temporal_merge_size": settings.get("temporal_conv_size", 2),
        "rms_norm_eps": original.get("rms_norm_eps", 1e-6),
    }


def _layer_types(settings: dict[str, Any], layers: int) -> list[str]:
    """Layers with experts, by the first and last index that either kind of expert has."""
    first, last = (_pair(settings, f"moe_layer_{end}_index") for end in ("start", "end"))
    interval = _count({"moe_layer_interval": 1} | settings, "moe_layer_interval")
    ends = [layers - 1 if end == -1 else end for end in last]
    return [
        "sparse" if (i + 1) % interval == 0 and min(first) <= i <= max(ends) else "dense"
        for i in range(layers)
    ]


def _entry(settings: dict[str, Any], name: str, where: str = "") -> Any:
    if settings.get(name) is None:
        raise ErnieQuantError(
            f"config.json of {ORIGINAL_MODEL_TYPE} lacks {name}{where}; restore it"
        )
    return settings[name]


def _count(settings: dict[str, Any], name: str) -> int:
    """An entry that others are made of."""
    value = _entry(settings, name)
    if type(value) is not int or value < 1:
        raise ErnieQuantError(f"config.json has {name} {value!r}; expected a positive integer")
    return value


def _pair(settings: dict[str, Any], name: str) -> list[int]:
    """An entry with one integer for text and one for vision."""
    value = _entry(settings, name)
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(type(n) is int for n in pair):
        raise ErnieQuantError(
            f"config.json has {name} {value!r}; expected an integer for text and one for vision"
        )
    return pair


def _same(settings: dict[str, Any], name: str) -> int:
    text, vision = _pair(settings, name)
    if text != vision:
        raise ErnieQuantError(
            f"config.json has {name} [{text}, {vision}]; transformers runs only models with as "
            "many vision experts as text experts"
        )
    return text
