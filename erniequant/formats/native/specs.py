"""Codes, tiles and tensors that our own layout has for a model, before anything is quantised."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from erniequant.checkpoint.layout import OutputTensor
from erniequant.codes import ConvolutionalCode, chosen_code
from erniequant.errors import ErnieQuantError
from erniequant.formats.plan import PlanWording, QuantizeOptions
from erniequant.models.architecture import ExpertGroup, ModelSizes
from erniequant.packing.layer_keys import experts_module, guard_name
from erniequant.packing.rotation import block_size
from erniequant.packing.schema import LayerSpec, MatrixSpec, layer_params, tile_size

Specs = Mapping[str, LayerSpec]
"""Codes of each group of experts, by its name, the same in every layer."""


def code_of(options: QuantizeOptions) -> ConvolutionalCode:
    """The code that experts are quantised with.

    Raises:
        ErnieQuantError: the option ``code`` names none of this width.
    """
    return chosen_code(options.bits, options.effort, options.own.get("code"))


def specs_of(sizes: ModelSizes, options: QuantizeOptions) -> dict[str, LayerSpec]:
    """The codes of a result.

    Raises:
        ErnieQuantError: no tile fits.
    """
    return {group.name: layer_spec(sizes.hidden, group, options) for group in sizes.groups}


def settings_of(specs: Specs) -> dict[str, Any]:
    """The codes as JSON; by name of the group where there is more than one."""
    settings = {name: asdict(spec) for name, spec in specs.items()}
    return settings if len(settings) > 1 else next(iter(settings.values()))


def wording_of(sizes: ModelSizes, specs: Specs) -> PlanWording:
    """The plan's wording for our own layout."""
    lines = tuple(line for group in sizes.groups for line in _code_lines(sizes, group, specs))
    return PlanWording(lines, "copy", "with their shapes and types", "transformers does not run")


def _code_lines(sizes: ModelSizes, group: ExpertGroup, specs: Specs) -> Iterator[str]:
    spec, several = specs[group.name], len(sizes.groups) > 1
    if several:
        yield f"{group.experts} experts of {group.name}, inner size {group.inner}:"
    for what, matrix in (("gate and up:", spec.gate_up_proj), ("down:", spec.down_proj)):
        yield (
            f"{'  ' * several}{what:12} {matrix.code}, register {matrix.register_length}, "
            f"tile {matrix.tile}, rotation block {matrix.rotation_block}"
        )


def expert_tensors(sizes: ModelSizes, specs: Specs) -> tuple[OutputTensor, ...]:
    """The tensors that all experts are stored in, layer after layer."""
    return tuple(
        tensor
        for index in sizes.moe_layers
        for group in sizes.groups
        for tensor in packed_tensors(sizes.hidden, group, index, specs[group.name])
    )


def packed_tensors(
    hidden: int, group: ExpertGroup, layer: int, spec: LayerSpec
) -> tuple[OutputTensor, ...]:
    """The tensors that a group of experts of a layer is stored in."""
    key = group.layer_key(layer)
    params = layer_params(
        group.experts, hidden, group.inner, spec, f"layer {key}", guard=guard_name(key)
    )
    prefix = packed_prefix(key)
    return tuple(
        OutputTensor.of(prefix + name, shape, dtype) for name, (shape, dtype) in params.items()
    )


def packed_prefix(layer_key: str) -> str:
    """Prefix of the names of a quantised layer's tensors."""
    return f"model.{experts_module(layer_key)}."


def layer_spec(hidden: int, group: ExpertGroup, options: QuantizeOptions) -> LayerSpec:
    """Code, tile and rotation block of both projections of a group of experts.

    Raises:
        ErnieQuantError: a size has no tile of at least 32, or does not split ``max_tp`` ways.
    """
    inner = f"the experts' inner size{f' ({group.name})' if group.name else ''}"
    if group.inner % options.max_tp:
        raise ErnieQuantError(f"--max-tp {options.max_tp} does not divide {inner} {group.inner}")
    per_rank = group.inner // options.max_tp
    code = code_of(options)
    name, length = code.name, code.register_length
    return LayerSpec(
        MatrixSpec(name, length, tile_size(per_rank, f"{inner} per rank"), block_size(hidden)),
        MatrixSpec(name, length, tile_size(hidden, "the hidden size"), block_size(per_rank)),
    )
