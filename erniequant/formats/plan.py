"""What will happen to every tensor of a source checkpoint, decided from names and shapes before
any work.

Every tensor is either one of the expert matrices or one of the model's others, which are copied;
all of them must be there. Anything else stops the run: an unknown tensor must not be dropped or
copied without anyone noticing.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from erniequant.checkpoint.layout import OutputTensor
from erniequant.checkpoint.reader import Checkpoint
from erniequant.codes import EFFORTS, code_for_bits, register_length
from erniequant.errors import ErnieQuantError
from erniequant.formats.inventory import TensorGroup, tensor_groups
from erniequant.models.architecture import EXPERT_MATRICES, Architecture, ExpertGroup, ModelSizes
from erniequant.models.config_check import fused_experts, not_part_of, tensor_misfits
from erniequant.packing.rotation import block_size
from erniequant.packing.schema import (
    LayerSpec,
    MatrixSpec,
    experts_module,
    guard_name,
    layer_params,
    tile_size,
)

NATIVE, FASTDEPLOY = "native", "fastdeploy-wint2"
FORMATS = (NATIVE, FASTDEPLOY)

# Multi-token prediction: transformers does not run it, but it stays with the model.
_MTP = re.compile(r"model\.mtp_.+")
# A tied head may be stored although it repeats the embedding.
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class QuantizeOptions:
    """What to make of the experts.

    ``k_order`` and ``w4_layers``, the number of first MoE layers with 4 bits, are of FastDeploy's
    format.
    """

    bits: int
    effort: str = "standard"
    max_tp: int = 2
    seed: int = 0
    format: str = NATIVE
    k_order: str | None = None
    w4_layers: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ErnieQuantError(f"bits must be 2, 3 or 4, not {self.bits!r}")
        if self.format not in FORMATS:
            raise ErnieQuantError(f"no format {self.format!r}; use {' or '.join(FORMATS)}")
        if self.format == NATIVE and (self.k_order is not None or self.w4_layers is not None):
            raise ErnieQuantError(
                f"k-order and w4-layers are of the format {FASTDEPLOY}; leave them out"
            )
        if self.format == FASTDEPLOY and self.bits != 2:
            raise ErnieQuantError(
                f"{FASTDEPLOY} has 2 bits, not {self.bits}; use --bits 2, and --w4-layers for "
                "layers of 4 bits"
            )
        if self.effort not in EFFORTS:
            raise ErnieQuantError(
                f"effort must be one of {', '.join(EFFORTS)}, not {self.effort!r}"
            )
        if self.max_tp < 1:
            raise ErnieQuantError(f"max-tp must be at least 1, not {self.max_tp}")


@dataclass(frozen=True)
class Plan:
    """The fate of every tensor, and the size of the result.

    ``specs`` are the native codes of each group of experts, by its name, the same in every layer;
    ``settings`` describe another format.
    ``packed`` are the tensors that take the place of ``quantized``; ``mtp`` those of ``copied``
    that transformers does not run. ``expert_bytes`` and ``copied_bytes`` are those of the output;
    ``source_bytes`` of the input. ``groups`` is the same list of tensors for people to read.
    """

    model: ModelSizes
    options: QuantizeOptions
    specs: Mapping[str, LayerSpec]
    quantized: tuple[str, ...]
    copied: tuple[str, ...]
    mtp: tuple[str, ...]
    packed: tuple[OutputTensor, ...]
    expert_weights: int
    total_weights: int
    source_bytes: int
    expert_bytes: int
    copied_bytes: int
    groups: tuple[TensorGroup, ...]
    settings: Mapping[str, Any] | None = None

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return self.expert_bytes + self.copied_bytes

    @property
    def expert_bits_per_weight(self) -> float:
        """Bits per expert weight, scales and signs included."""
        return 8 * self.expert_bytes / self.expert_weights

    @property
    def total_bits_per_weight(self) -> float:
        """Bits per weight of the whole result."""
        return 8 * self.output_bytes / self.total_weights

    def format_settings(self) -> dict[str, Any]:
        """The codes as JSON; by name of the group where there is more than one."""
        if self.settings is not None:
            return dict(self.settings)
        settings = {name: asdict(spec) for name, spec in self.specs.items()}
        return settings if len(settings) > 1 else next(iter(settings.values()))


def make_plan(checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions) -> Plan:
    """Decide what happens to every tensor of ``checkpoint``.

    Raises:
        ErnieQuantError: a tensor is missing, has another shape, or is unknown, or no tile fits.
    """
    sizes = model.sizes
    quantized = tuple(
        model.expert_matrix_name(layer, expert, matrix)
        for layer in sizes.moe_layers
        for expert in range(sizes.experts)
        for matrix in EXPERT_MATRICES
    )
    if model.config.hidden_act != "silu":
        raise ErnieQuantError(
            f"config.json has hidden_act {model.config.hidden_act!r}; only silu can be calibrated"
        )
    expert_names = set(quantized)
    known = {*expert_names, *model.required(), _HEAD}
    for line in fused_experts(checkpoint.headers, model, str(checkpoint.folder)):
        raise ErnieQuantError(line)
    for name in checkpoint.names():
        if name not in known and not _MTP.fullmatch(name):
            raise ErnieQuantError(not_part_of(name, model))
    for line in tensor_misfits(model, checkpoint.headers):
        raise ErnieQuantError(line)
    copied = tuple(name for name in checkpoint.names() if name not in expert_names)
    specs = {group.name: layer_spec(sizes.hidden, group, options) for group in sizes.groups}
    packed = tuple(
        tensor
        for index in sizes.moe_layers
        for group in sizes.groups
        for tensor in packed_tensors(sizes.hidden, group, index, specs[group.name])
    )
    return Plan(
        sizes,
        options,
        specs,
        quantized,
        copied,
        tuple(name for name in copied if _MTP.fullmatch(name)),
        packed,
        expert_weights=sum(checkpoint.header(name).elements for name in quantized),
        total_weights=sum(header.elements for header in checkpoint.headers.values()),
        source_bytes=checkpoint.total_bytes,
        expert_bytes=sum(tensor.n_bytes for tensor in packed),
        copied_bytes=sum(checkpoint.header(name).n_bytes for name in copied),
        groups=tensor_groups(checkpoint, quantized, copied),
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
    """What the names of a quantised layer's tensors begin with."""
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
    length = register_length(options.bits, options.effort)
    code = code_for_bits(options.bits, length).name
    return LayerSpec(
        MatrixSpec(code, length, tile_size(per_rank, f"{inner} per rank"), block_size(hidden)),
        MatrixSpec(code, length, tile_size(hidden, "the hidden size"), block_size(per_rank)),
    )
