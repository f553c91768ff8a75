"""Check in plain arithmetic that a config.json belongs to the tensors beside it, before
transformers builds a module for every layer that the file claims.

A wrong number would otherwise cost memory without bound, or give a model that runs and is wrong:
transformers fills what is missing with random numbers and only warns of what is left over.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from erniequant.checkpoint.config import QUANTIZED_BY
from erniequant.checkpoint.reader import TensorHeader
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import EXPERT_MATRICES, Architecture, ExpertGroup, Shapes
from erniequant.models.registry import FAMILIES, architecture_of, require_family
from erniequant.models.settings import entries, require_harmless
from erniequant.packing.layer_keys import SLOTS, experts_module, layer_key_of
from erniequant.packing.schema import PROJECTIONS

_LAYER_COUNTS = ("num_hidden_layers", "depth", "num_layers")
_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
          "num_key_value_heads", "num_heads", "head_dim", "embed_dim")  # fmt: skip
_MAX_INTERMEDIATE = 2**20
# Not run by transformers, which leaves them out, and so need not be there.
_NOT_RUN = "mtp"
_FUSED = re.compile(
    r"(model\.)?(language_model\.)?layers\.\d+\."
    rf"({'|'.join(re.escape(slot.module) for slot in SLOTS.values() if not slot.dense)})\."
    rf"({'|'.join(PROJECTIONS)})(\.weight)?"
)


def require_bounded(settings: dict[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Refuse a config.json that is harmful by itself, or has sizes beyond every tensor.

    Raises:
        ErnieQuantError: also for another architecture.
    """
    require_family(settings)
    require_harmless(settings)
    largest = max((n for header in headers.values() for n in header.shape), default=0)
    limits = dict.fromkeys((*_SIZES, *_expert_sizes()), largest) | dict.fromkeys(
        _LAYER_COUNTS, len(headers)
    )
    # Without a layer that is not quantised, no tensor has it.
    limits["intermediate_size"] = max(largest, _MAX_INTERMEDIATE)
    for key, value in entries(settings):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > limits.get(key, number):
                raise ErnieQuantError(
                    f"config.json has {key} {number}, which is more than the tensors of the "
                    "checkpoint can have; it is damaged or belongs to another checkpoint"
                )


def _expert_sizes() -> Iterator[str]:
    """Entries with numbers and sizes of experts, of whatever family."""
    for family in FAMILIES.values():
        yield from (*family.expert_count_keys, family.inner_size_key)


def require_fit(
    settings: dict[str, Any], headers: Mapping[str, TensorHeader], packed: Collection[str] = ()
) -> None:
    """Refuse a checkpoint of a text model with the first of its `misfits`; bounds come first.

    Raises:
        ErnieQuantError: also for what `require_bounded` refuses.
    """
    for line in misfits(settings, headers, packed):
        raise ErnieQuantError(line)


def bounded_architecture(
    settings: dict[str, Any], headers: Mapping[str, TensorHeader]
) -> Architecture:
    """The architecture of a plain checkpoint.

    Raises:
        ErnieQuantError: what `require_bounded` and `architecture_of` refuse.
    """
    require_bounded(settings, headers)
    return architecture_of(settings).adapt(headers)


def misfits(
    settings: dict[str, Any], headers: Mapping[str, TensorHeader], packed: Collection[str] = ()
) -> Iterator[str]:
    """Every tensor that is missing, left over, of another shape, or of no float type.

    packed: keys of quantised layers, whose experts are checked elsewhere.

    Raises:
        ErnieQuantError: what `require_bounded` refuses, or sizes that make no model.
    """
    plain = {k: v for k, v in settings.items() if k not in QUANTIZED_BY}
    yield from tensor_misfits(bounded_architecture(plain, headers), headers, packed)


def tensor_misfits(
    model: Architecture, headers: Mapping[str, TensorHeader], packed: Collection[str] = ()
) -> Iterator[str]:
    """`misfits` where the architecture is known already."""
    embedding = next((name for name in headers if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        yield "tensor model.embed_tokens.weight is missing from the checkpoint"
        return
    if model.images is not None:
        # Their other tensors have other names as well.
        for line in fused_experts(headers, model):
            yield line
            return
    # A headless model is saved without "model."
    prefix = embedding.removesuffix("embed_tokens.weight")
    required, optional = _expected(model, prefix, headers, packed)
    expected = required | optional
    for name, header in headers.items():
        if name in expected:
            yield from _misfit(header, expected[name])
        elif _NOT_RUN not in name and layer_key_of(name, model.is_dense()) not in packed:
            yield not_part_of(name, model)
    for name in required:
        if name not in headers:
            yield f"tensor {name} is missing from the checkpoint"


def not_part_of(name: str, model: Architecture) -> str:
    """The line for a tensor that the model does not have."""
    return (
        f"tensor {name} is not part of an {model.description} as config.json describes it; "
        "check that config.json and weights belong together"
    )


def fused_experts(
    headers: Mapping[str, TensorHeader], model: Architecture, source: str = "SRC"
) -> Iterator[str]:
    """The line for the first tensor that holds all experts of a layer, if there is one.

    transformers writes such names again for a model that it loaded with them, unless it is made to
    forget how it loaded it.
    """
    for name, header in headers.items():
        # The guard of quantised layers has such a name too, and one dimension.
        if len(header.shape) == 3 and _FUSED.fullmatch(name):
            yield (
                f"tensor {name} holds all experts of a layer in one; make a checkpoint with one "
                f'tensor per expert: python -c "from transformers import {model.auto_class} as A; '
                f"m = A.from_pretrained('{source}'); m._weight_conversions = None; "
                "m.save_pretrained('NEW')\", then copy the tokenizer files to NEW and give NEW"
            )
            return


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


def _expected(
    model: Architecture, prefix: str, headers: Mapping[str, TensorHeader], packed: Collection[str]
) -> tuple[Shapes, Shapes]:
    """Shapes of the tensors that must be there, and of those that may."""
    required: Shapes = {}
    # A tied head may be stored although it repeats the embedding.
    optional: Shapes = {"lm_head.weight": (model.sizes.vocabulary, model.sizes.hidden)}
    for name, shape in model.required().items():
        if not name.startswith("model."):
            (required if prefix else optional)[name] = shape
            continue
        stored_name = prefix + name.removeprefix("model.")
        if model.optional(name):
            optional[stored_name] = shape
            optional[model.name_in_memory(stored_name)] = shape
        else:
            required[stored_name] = shape
    for layer in model.sizes.moe_layers:
        for group in model.sizes.groups:
            if group.layer_key(layer) not in packed:
                required |= _matrices(model, group, prefix, layer, headers)
    return required, optional


def _matrices(
    model: Architecture,
    group: ExpertGroup,
    prefix: str,
    layer: int,
    headers: Mapping[str, TensorHeader],
) -> Shapes:
    experts, hidden, inner = group.experts, model.sizes.hidden, group.inner
    fused = f"{prefix}{experts_module(group.layer_key(layer))}."
    if f"{fused}gate_up_proj" in headers:
        return {f"{fused}gate_up_proj": (experts, 2 * inner, hidden),
                f"{fused}down_proj": (experts, hidden, inner)}  # fmt: skip
    shapes = dict(
        zip(EXPERT_MATRICES, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True)
    )
    return {
        prefix + model.expert_matrix_name(layer, expert, matrix).removeprefix("model."): shape
        for expert in group.numbers
        for matrix, shape in shapes.items()
    }
