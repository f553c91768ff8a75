"""Check a checkpoint against its own quantization_config, from headers alone.

transformers only warns of missing tensors and leaves random numbers in their place; here every
tensor that should be there, should not be there, or has another shape or dtype is named.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from erniequant.checkpoint.reader import Checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import Architecture
from erniequant.models.registry import family_of
from erniequant.packing.experts import HeaderCheck, QuantizedExperts, is_quantized
from erniequant.packing.layer_keys import (
    experts_module,
    guard_name,
    is_dense_key,
    layer_key_of,
    slot_of,
)
from erniequant.packing.schema import (
    PROJECTIONS,
    SUFFIXES,
    LayerSpec,
    QuantizationMetadata,
    layer_params,
)

_PACKED_NAME = re.compile(rf"\.({'|'.join(PROJECTIONS)})_({'|'.join(SUFFIXES)})$")


def is_dense(config: dict[str, Any]) -> bool:
    """True if a config.json describes a dense model, whose MLPs take the place of experts."""
    family = family_of(config)
    return family is not None and family.is_dense()


def check_headers(checkpoint: Checkpoint) -> HeaderCheck:
    """Compare headers with `quantization_config`; problems are returned, not raised.

    Raises:
        ErnieQuantError: no quantization_config, or one this version cannot read.
    """
    settings = checkpoint.config.get("quantization_config")
    if not isinstance(settings, dict):
        raise ErnieQuantError(
            f"{checkpoint.folder} is not quantised: its config.json has no quantization_config"
        )
    metadata = QuantizationMetadata.from_dict(settings)
    layers = tuple(_experts(checkpoint, key, spec) for key, spec in metadata.layers.items())
    problems = [line for layer in layers for line in _layer_problems(checkpoint, layer)]
    problems += _orphans(checkpoint, layers)
    return HeaderCheck(metadata, layers, tuple(problems))


def sound_if_quantized(checkpoint: Checkpoint) -> HeaderCheck | None:
    """`require_sound` for a quantised checkpoint, None for a plain one.

    Raises:
        ErnieQuantError: also for packed tensors of which config.json does not say what they are.
    """
    if is_quantized(checkpoint.config):
        return require_sound(checkpoint)
    for name in checkpoint.names():
        if layer_key_of(name) is not None and _PACKED_NAME.search(name):
            raise ErnieQuantError(
                f"{checkpoint.folder}: tensor {name} is quantised, but config.json has no "
                "quantization_config of erniequant; restore it"
            )
    return None


def require_sound(checkpoint: Checkpoint) -> HeaderCheck:
    """`check_headers`, raising ErnieQuantError with the first problem."""
    contents = check_headers(checkpoint)
    if contents.problems:
        more = f" (and {len(contents.problems) - 1} more)" if len(contents.problems) > 1 else ""
        raise ErnieQuantError(f"{checkpoint.folder}: {contents.problems[0]}{more}")
    return contents


def kept_names(checkpoint: Checkpoint, layers: Iterable[QuantizedExperts]) -> list[str]:
    """Tensors outside the quantised layers, which are stored as in the original."""
    keys, dense = {layer.key for layer in layers}, is_dense(checkpoint.config)
    return [name for name in checkpoint.names() if layer_key_of(name, dense) not in keys]


def expert_sizes(config: dict[str, Any], key: str) -> tuple[int, int, int]:
    """Number of experts, hidden size and inner size that config.json gives for a layer key.

    Raises:
        ErnieQuantError: config.json does not say, or describes a model without such layers.
    """
    dense = is_dense(config)
    if dense != is_dense_key(key):
        wanted = "keys with .mlp" if dense else "keys without .mlp"
        raise ErnieQuantError(
            f"quantization_config names layer {key}, but layers of model_type "
            f"{config.get('model_type')!r} have {wanted}; the config.json is damaged"
        )
    if dense and config.get("use_bias"):
        raise ErnieQuantError(
            f"config.json has use_bias, but quantised layer {key} has no place for the bias of an "
            "MLP; only models without are supported"
        )
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ErnieQuantError(f"config.json has text_config {text!r}; expected an object")
    family = _family(config)
    experts: Any = 1 if dense else family.expert_count(text)
    inner: Any = text.get(family.inner_size_key)
    if isinstance(inner, list) and len(inner) == 2:
        inner = inner[_set_number(family, key)]
    sizes = dict.fromkeys(family.expert_count_keys[:1], experts)
    sizes |= {"hidden_size": text.get("hidden_size"), family.inner_size_key: inner}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ErnieQuantError(f"config.json has {name} {value!r}; expected a positive integer")
    return experts, text["hidden_size"], inner


def _experts(checkpoint: Checkpoint, key: str, spec: LayerSpec) -> QuantizedExperts:
    module, dense = experts_module(key), is_dense_key(key)
    # A headless model is saved without "model.", a vision-language one may be saved with more.
    prefix = next(
        (
            name[: name.index(module)]
            for name in checkpoint.names()
            if layer_key_of(name, dense) == key
        ),
        "model.",
    )
    experts, hidden, inner = expert_sizes(checkpoint.config, key)
    family = _family(checkpoint.config)
    return QuantizedExperts(
        key, f"{prefix}{module}.", experts, hidden, inner, spec, family.matrix_pattern,
        _set_number(family, key) * experts,
    )  # fmt: skip


def _family(config: dict[str, Any]) -> type[Architecture]:
    """The family of a model; of an unknown one, which is refused later, the usual facts."""
    return family_of(config) or Architecture


def _set_number(family: type[Architecture], key: str) -> int:
    """The set of a layer's experts that a key means."""
    slot = slot_of(key)
    return family.slots.index(slot) if slot in family.slots else 0


def _layer_problems(checkpoint: Checkpoint, layer: QuantizedExperts) -> Iterator[str]:
    guard = guard_name(layer.key)
    try:
        expected = layer_params(
            layer.experts, layer.hidden, layer.inner, layer.spec, f"layer {layer.key}", guard=guard
        )
    except ErnieQuantError as error:
        yield str(error)
        return
    for suffix, (shape, dtype) in expected.items():
        name = layer.prefix + suffix
        header = checkpoint.headers.get(name)
        if header is None:
            what = "the guard tensor" if suffix == guard else "tensor"
            yield f"{what} {name} is missing"
        elif header.dtype != dtype:
            wanted = str(dtype).removeprefix("torch.")
            yield f"tensor {name} has dtype {header.stored_dtype}, expected {wanted}"
        elif header.shape != shape:
            yield f"tensor {name} has shape {list(header.shape)}, expected {list(shape)}"
    expected_names = {layer.prefix + suffix for suffix in expected}
    for name in checkpoint.names():
        if layer_key_of(name, is_dense_key(layer.key)) == layer.key and name not in expected_names:
            yield f"tensor {name} does not belong: its layer is quantised"


def _orphans(checkpoint: Checkpoint, layers: Iterable[QuantizedExperts]) -> Iterator[str]:
    dense = is_dense(checkpoint.config)
    for name in kept_names(checkpoint, layers):
        if _PACKED_NAME.search(name):
            key = layer_key_of(name, dense)
            layer = "its layer" if key is None else f"layer {key}"
            yield f"tensor {name} has no entry: quantization_config does not name {layer}"
