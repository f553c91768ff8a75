"""transformers' config of vision-language models in the terms of vLLM, which reads only Baidu's:
without a part for text, and with two numbers where the sets of experts may differ."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.models.ernie45_vl import Ernie45Vl
from erniequant.models.vl_config import MODEL_TYPE

ARCHITECTURE = "ErnieQuantVLMoeForConditionalGeneration"
"""Our own, as Baidu's checkpoints have the stock name but another processor and config."""

_TOWER_EPS, _TOWER_THETA, _TOWER_ACT = 1e-6, 1e4, "quick_gelu"


class FlatConfig(PretrainedConfig):
    """Made of the entries of a config.json with ``model_type`` ernie4_5_vl_moe."""

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, **settings: Any):
        """Raises ErnieQuantError for a model that vLLM would compute wrongly."""
        super().__init__(**flat(settings))


def register() -> None:
    """Have vLLM read such configs as `FlatConfig`; calling it again does nothing."""
    _CONFIG_REGISTRY[MODEL_TYPE] = FlatConfig


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The entries that vLLM reads, with transformers' defaults for what config.json leaves out.

    Raises:
        ErnieQuantError: transformers refuses the config, or vLLM has no setting for something.
    """
    with wrap_errors(f"config.json is not a valid {MODEL_TYPE} config"):
        # A copy: transformers rewrites nested settings in place.
        config = Ernie45Vl.config_class()(**copy.deepcopy(settings))
    text, vision = config.text_config, config.vision_config
    _require_known(text, vision)
    first, last, interval = expert_layers(text.mlp_layer_types)
    vision.embed_dim = vision.hidden_size
    # vLLM multiplies again and rounds down.
    vision.mlp_ratio = (vision.intermediate_size + 0.5) / vision.hidden_size
    decoder = {k: v for k, v in text.to_dict().items() if k not in ("model_type", "architectures")}
    whole = {k: v for k, v in settings.items() if k not in ("model_type", "text_config")}
    ids = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    return {
        **decoder,
        **whole,
        **ids,
        "architectures": [ARCHITECTURE],
        "vision_config": vision,
        "tie_word_embeddings": config.tie_word_embeddings,
        "moe_num_experts": [text.moe_num_experts] * 2,
        "moe_layer_start_index": [first, first],
        "moe_layer_end_index": [last, last],
        "moe_layer_interval": interval,
        "freq_allocation": text.rope_parameters["mrope_section"][2],
        "rope_3d": True,
        "pixel_hidden_size": vision.hidden_size,
        "spatial_conv_size": vision.spatial_merge_size,
        "temporal_conv_size": vision.temporal_merge_size,
        "use_temporal_conv": True,
        "im_patch_id": config.image_token_id,
    }


def expert_layers(types: Sequence[str]) -> tuple[int, int, int]:
    """First and last layer with experts, and the interval, as Baidu's config describes them.

    Raises:
        ErnieQuantError: it cannot describe them.
    """
    sparse = [index for index, kind in enumerate(types) if kind == "sparse"]
    for interval in range(1, len(types) + 1):
        within = range(sparse[0], sparse[-1] + 1) if sparse else ()
        if sparse and [i for i in within if (i + 1) % interval == 0] == sparse:
            return sparse[0], sparse[-1], interval
    raise ErnieQuantError(
        f"config.json has mlp_layer_types {list(types)}; vLLM takes experts in every n-th layer of "
        "a range only"
    )


def _require_known(text: Any, vision: Any) -> None:
    """Refuse what vLLM's model of this family has no setting for, and would do otherwise."""
    rope = text.rope_parameters or {}
    section = list(rope.get("mrope_section") or ())
    size = text.head_dim if getattr(text, "head_dim", None) else (
        text.hidden_size // text.num_attention_heads
    )  # fmt: skip
    plane = (size // 2 - section[2]) // 2 if len(section) == 3 else -1
    theta = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", _TOWER_THETA)
    facts = {
        "use_bias": (bool(text.use_bias), False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "mrope_section": (section, [plane, plane, *section[2:]]),
        "hidden_act of vision_config": (vision.hidden_act, _TOWER_ACT),
        "rms_norm_eps of vision_config": (vision.rms_norm_eps, _TOWER_EPS),
        "rope_theta of vision_config": (theta, _TOWER_THETA),
    }
    for name, (found, fixed) in facts.items():
        if found != fixed:
            raise ErnieQuantError(
                f"config.json has {name} {found}; vLLM computes such models only with {fixed}"
            )
