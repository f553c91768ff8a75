"""What will happen to every tensor of a source checkpoint, decided from names and shapes before
any work.

Every tensor is either one of the expert matrices, all of which must be there, or one of the known
others, which are copied. Anything else stops the run: an unknown tensor must not be dropped or
copied without anyone noticing.
"""

import math
import re
from dataclasses import dataclass

from erniequant.checkpoint.reader import Checkpoint
from erniequant.codes import EFFORTS, code_for_bits, register_length
from erniequant.errors import ErnieQuantError
from erniequant.format.schema import (
    LayerSpec,
    MatrixSpec,
    QuantizationMetadata,
    layer_params,
)
from erniequant.models.ernie45_text import EXPERT_MATRICES, TextMoe, expert_matrix_name
from erniequant.quantization.inventory import TensorGroup, tensor_groups
from erniequant.rotation import block_size

MIN_TILE, MAX_TILE = 32, 256

# Names of everything that is copied; MTP tensors are not run by transformers, but stay with the
# model.
_COPIED = re.compile(
    r"lm_head\.weight"
    r"|model\.(embed_tokens|norm)\.weight"
    r"|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight"
    r"|model\.layers\.\d+\.self_attn\.[qkvo]_proj\.(weight|bias)"
    r"|model\.layers\.\d+\.mlp\.(shared_experts\.)?(gate|up|down)_proj\.(weight|bias)"
    r"|model\.layers\.\d+\.mlp\.gate\.weight"
    r"|model\.layers\.\d+\.mlp\.moe_statics\.e_score_correction_bias"
    r"|model\.mtp_.+"
)


@dataclass(frozen=True)
class QuantizeOptions:
    """What to make of the experts."""

    bits: int
    effort: str = "standard"
    max_tp: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ErnieQuantError(f"bits must be 2, 3 or 4, not {self.bits!r}")
        if self.effort not in EFFORTS:
            raise ErnieQuantError(
                f"effort must be one of {', '.join(EFFORTS)}, not {self.effort!r}"
            )
        if self.max_tp < 1:
            raise ErnieQuantError(f"max-tp must be at least 1, not {self.max_tp}")


@dataclass(frozen=True)
class Plan:
    """The fate of every tensor, and the size of the result.

    ``expert_bytes`` and ``copied_bytes`` are those of the output; ``source_bytes`` of the input.
    ``groups`` is the same list of tensors for people to read.
    """

    model: TextMoe
    options: QuantizeOptions
    layer: LayerSpec
    quantized: tuple[str, ...]
    copied: tuple[str, ...]
    expert_weights: int
    total_weights: int
    source_bytes: int
    expert_bytes: int
    copied_bytes: int
    groups: tuple[TensorGroup, ...]

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

    def metadata(self, producer: str) -> QuantizationMetadata:
        """The `quantization_config` of the result."""
        layers = {str(index): self.layer for index in self.model.moe_layers}
        return QuantizationMetadata(layers, producer)


def make_plan(checkpoint: Checkpoint, model: TextMoe, options: QuantizeOptions) -> Plan:
    """Decide what happens to every tensor of ``checkpoint``.

    Raises:
        ErnieQuantError: an expert matrix is missing or has another shape, a tensor is unknown, or
            no tile fits.
    """
    shapes = {
        "gate_proj": (model.inner, model.hidden),
        "up_proj": (model.inner, model.hidden),
        "down_proj": (model.hidden, model.inner),
    }
    quantized = tuple(
        expert_matrix_name(layer, expert, matrix)
        for layer in model.moe_layers
        for expert in range(model.experts)
        for matrix in EXPERT_MATRICES
    )
    for name in quantized:
        found = checkpoint.header(name)
        wanted = shapes[name.split(".")[-2]]
        if found.shape != wanted:
            raise ErnieQuantError(
                f"{name} has shape {found.shape}, but config.json asks for {wanted}"
            )
        if found.dtype is None or not found.dtype.is_floating_point:
            raise ErnieQuantError(
                f"{name} is stored as {found.stored_dtype}; give a bf16, fp16 or fp32 checkpoint"
            )
    expert_names = set(quantized)
    copied = tuple(name for name in checkpoint.names() if name not in expert_names)
    for name in copied:
        if not _COPIED.fullmatch(name):
            raise ErnieQuantError(
                f"tensor {name} is not part of an ERNIE 4.5 text MoE as config.json describes it; "
                "check that config.json and weights belong together"
            )
    layer = layer_spec(model, options)
    params = layer_params(model.experts, model.hidden, model.inner, layer)
    layer_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in params.values())
    return Plan(
        model,
        options,
        layer,
        quantized,
        copied,
        expert_weights=sum(checkpoint.header(name).elements for name in quantized),
        total_weights=sum(header.elements for header in checkpoint.headers.values()),
        source_bytes=checkpoint.total_bytes,
        expert_bytes=layer_bytes * len(model.moe_layers),
        copied_bytes=sum(checkpoint.header(name).n_bytes for name in copied),
        groups=tensor_groups(checkpoint, quantized, copied),
    )


def layer_spec(model: TextMoe, options: QuantizeOptions) -> LayerSpec:
    """Code, tile and rotation block of both projections, the same in every layer.

    Raises:
        ErnieQuantError: a size has no tile of at least 32, or does not split ``max_tp`` ways.
    """
    if model.inner % options.max_tp:
        raise ErnieQuantError(
            f"--max-tp {options.max_tp} does not divide the experts' inner size {model.inner}"
        )
    per_rank = model.inner // options.max_tp
    length = register_length(options.bits, options.effort)
    code = code_for_bits(options.bits, length).name
    return LayerSpec(
        MatrixSpec(
            code,
            length,
            tile_size(per_rank, "the experts' inner size per rank"),
            block_size(model.hidden),
        ),
        MatrixSpec(code, length, tile_size(model.hidden, "the hidden size"), block_size(per_rank)),
    )


def tile_size(outputs: int, what: str) -> int:
    """The largest power of two from 32 to 256 that divides ``outputs``.

    Raises:
        ErnieQuantError: there is none; ``what`` names the size.
    """
    tile = min(outputs & -outputs, MAX_TILE)
    if tile < MIN_TILE:
        raise ErnieQuantError(
            f"{what}, {outputs}, is not a multiple of {MIN_TILE}; try a smaller --max-tp"
        )
    return tile
