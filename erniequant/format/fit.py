"""Does a config.json belong to the tensors beside it? Asked in plain arithmetic, before
transformers builds a module for every layer that the file claims.

A wrong number would otherwise cost memory without bound, or give a model that runs and is wrong:
transformers fills what is missing with random numbers and only warns of what is left over.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from erniequant.checkpoint.reader import TensorHeader
from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.format.schema import layer_key_of
from erniequant.models.ernie45_text import MODEL_TYPE, TextMoe, expert_matrix_name, text_config
from erniequant.models.settings import entries, require_harmless

VISION_MODEL_TYPE = "ernie4_5_vl_moe"
_LAYER_COUNTS = ("num_hidden_layers", "depth", "num_layers")
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "moe_num_experts",
          "num_experts", "vocab_size", "num_attention_heads", "num_key_value_heads", "num_heads",
          "head_dim", "embed_dim")  # fmt: skip
# Not run by transformers, which leaves them out, and so need not be there.
_NOT_RUN = "mtp"


def require_bounded(settings: dict[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Refuse a config.json that is harmful by itself, or has sizes beyond every tensor.

    Raises:
        ErnieQuantError: also for another architecture.
    """
    found = settings.get("model_type")
    if found not in (MODEL_TYPE, VISION_MODEL_TYPE):
        raise ErnieQuantError(
            f"config.json says model_type {found!r}; supported: {MODEL_TYPE}, {VISION_MODEL_TYPE}"
        )
    require_harmless(settings)
    largest = max((n for header in headers.values() for n in header.shape), default=0)
    limits = dict.fromkeys(_SIZES, largest) | dict.fromkeys(_LAYER_COUNTS, len(headers))
    for key, value in entries(settings):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > limits.get(key, number):
                raise ErnieQuantError(
                    f"config.json has {key} {number}, which is more than the tensors of the "
                    "checkpoint can have; it is damaged or belongs to another checkpoint"
                )


def require_fit(
    settings: dict[str, Any], headers: Mapping[str, TensorHeader], packed: Collection[str] = ()
) -> None:
    """Refuse a checkpoint of a text MoE with the first of its `misfits`; bounds come first.

    Raises:
        ErnieQuantError: also for what `require_bounded` refuses.
    """
    for line in misfits(settings, headers, packed):
        raise ErnieQuantError(line)


def misfits(
    settings: dict[str, Any], headers: Mapping[str, TensorHeader], packed: Collection[str] = ()
) -> Iterator[str]:
    """Every tensor that is missing, left over, of another shape, or of no float type.

    packed: keys of quantised layers, whose experts are checked elsewhere. Vision-language models
    are checked for bounds only.

    Raises:
        ErnieQuantError: what `require_bounded` refuses, or sizes that make no model.
    """
    require_bounded(settings, headers)
    if settings["model_type"] != MODEL_TYPE:
        return
    config = text_config({k: v for k, v in settings.items() if k != "quantization_config"})
    _require_possible(config)
    embedding = next((name for name in headers if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        yield "tensor model.embed_tokens.weight is missing from the checkpoint"
        return
    # A headless model is saved without "model."
    prefix = embedding.removesuffix("embed_tokens.weight")
    required, optional = _expected(config, prefix, headers, packed)
    known = required | optional
    for name, header in headers.items():
        if name in known:
            yield from _misfit(header, known[name])
        elif _NOT_RUN not in name and layer_key_of(name) not in packed:
            yield (
                f"tensor {name} is not part of an ERNIE 4.5 text MoE as config.json describes it; "
                "check that config.json and weights belong together"
            )
    for name in required:
        if name not in headers:
            yield f"tensor {name} is missing from the checkpoint"


def _misfit(header: TensorHeader, shape: tuple[int, ...]) -> Iterator[str]:
    if header.shape != shape:
        yield (
            f"{header.name} has shape {list(header.shape)}, but config.json asks for {list(shape)}"
        )
    elif header.dtype is None or not header.dtype.is_floating_point:
        yield (
            f"{header.name} is stored as {header.stored_dtype}; "
            "give a bf16, fp16 or fp32 checkpoint"
        )


def _require_possible(config: Any) -> None:
    positive = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "moe_num_experts",
        "num_attention_heads", "num_key_value_heads", "moe_intermediate_size", "moe_k",
        "moe_layer_interval", "max_position_embeddings",
    )  # fmt: skip
    for name in positive:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ErnieQuantError(f"config.json has {name} {value!r}; expected a positive integer")
    for name in ("moe_layer_start_index", "moe_layer_end_index", "moe_num_shared_experts"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 0:
            raise ErnieQuantError(f"config.json has {name} {value!r}; expected an integer")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = _head_size(config)
    if heads % groups or not isinstance(size, int) or size < 2 or size % 2:
        raise ErnieQuantError(
            f"config.json has {heads} attention heads of size {size} for {groups} keys and values; "
            "heads must be a multiple of these and their size even"
        )
    if config.moe_k > config.moe_num_experts:
        raise ErnieQuantError(
            f"config.json has moe_k {config.moe_k} of {config.moe_num_experts} experts"
        )


def _head_size(config: Any) -> Any:
    return getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)


Shapes = dict[str, tuple[int, ...]]


def _expected(
    config: Any, prefix: str, headers: Mapping[str, TensorHeader], packed: Collection[str]
) -> tuple[Shapes, Shapes]:
    """Shapes of the tensors that must be there, and of those that may."""
    hidden = config.hidden_size
    table = (config.vocab_size, hidden)
    required: Shapes = {f"{prefix}embed_tokens.weight": table, f"{prefix}norm.weight": (hidden,)}
    head: Shapes = {"lm_head.weight": table}
    optional: Shapes = dict(head)
    if prefix and not config.tie_word_embeddings:
        required |= head
    moe_layers = set(TextMoe.from_config(config).moe_layers)
    for index in range(config.num_hidden_layers):
        layer = f"{prefix}layers.{index}."
        linears = _attention(config)
        required[f"{layer}input_layernorm.weight"] = (hidden,)
        required[f"{layer}post_attention_layernorm.weight"] = (hidden,)
        if index not in moe_layers:
            linears |= _mlp("mlp.", hidden, config.intermediate_size)
        else:
            required[f"{layer}mlp.gate.weight"] = (config.moe_num_experts, hidden)
            for name in ("mlp.moe_statics.", "mlp.gate.moe_statics."):
                # Models without the bias do not store it; transformers takes zeros, rightly.
                optional[f"{layer}{name}e_score_correction_bias"] = (1, config.moe_num_experts)
            if config.moe_num_shared_experts:
                inner = config.moe_intermediate_size * config.moe_num_shared_experts
                linears |= _mlp("mlp.shared_experts.", hidden, inner)
            if str(index) not in packed:
                required |= _experts(config, prefix, index, headers)
        for name, shape in linears.items():
            required[f"{layer}{name}.weight"] = shape
            if config.use_bias:
                required[f"{layer}{name}.bias"] = shape[:1]
    return required, optional


def _attention(config: Any) -> dict[str, tuple[int, int]]:
    hidden, size = config.hidden_size, _head_size(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {
        f"{prefix}gate_proj": (inner, hidden),
        f"{prefix}up_proj": (inner, hidden),
        f"{prefix}down_proj": (hidden, inner),
    }


def _experts(config: Any, prefix: str, index: int, headers: Mapping[str, TensorHeader]) -> Shapes:
    experts, hidden, inner = (
        config.moe_num_experts, config.hidden_size, config.moe_intermediate_size
    )  # fmt: skip
    fused = f"{prefix}layers.{index}.mlp.experts."
    if f"{fused}gate_up_proj" in headers:
        return {f"{fused}gate_up_proj": (experts, 2 * inner, hidden),
                f"{fused}down_proj": (experts, hidden, inner)}  # fmt: skip
    return {
        prefix + expert_matrix_name(index, expert, name).removeprefix("model."): shape
        for expert in range(experts)
        for name, shape in _mlp("", hidden, inner).items()
    }


def require_size_on_disk(auto: Any, folder: Path, weights: int) -> None:
    """Refuse a model with more weights than the checkpoint, counted on one built without memory.

    For architectures whose tensors `misfits` does not know: whatever is missing would be filled
    with random numbers, up to the size that config.json claims.
    """
    with foreign_errors(f"transformers cannot build the model of {folder}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    claimed = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(p.numel() for n, p in model.named_parameters() if "e_score_correction" in n)
    if claimed - biases > weights:
        raise ErnieQuantError(
            f"config.json describes {claimed} weights, but the checkpoint has {weights}; "
            "check that config.json and weights belong together"
        )
