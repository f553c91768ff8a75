"""The fate of every tensor of a source checkpoint, decided from names and shapes before any work.

Every tensor is either one of the expert matrices or one of the model's others, which are copied;
all of them must be there. Anything else stops the run: an unknown tensor must not be dropped or
copied without anyone noticing.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from erniequant.checkpoint.layout import OutputTensor
from erniequant.checkpoint.reader import Checkpoint
from erniequant.codes import EFFORTS
from erniequant.errors import ErnieQuantError
from erniequant.formats.inventory import TensorGroup, tensor_groups
from erniequant.models.architecture import EXPERT_MATRICES, Architecture, ModelSizes
from erniequant.models.config_check import fused_experts, not_part_of, tensor_misfits
from erniequant.models.head import NORM

# Multi-token prediction: transformers does not run it, but it stays with the model.
_MTP = re.compile(r"model\.mtp_.+")
# A tied head may be stored although it repeats the embedding.
_HEAD = "lm_head.weight"


TUNE_MODES = ("none", "layer", "model")
"""Training after quantisation: none; every layer once its experts are packed; then the whole model
as well."""

SEARCHES = ("cpu", "cuda")
"""Where codes are searched."""

SENSITIVITIES = ("activation", "gradient")
"""How errors of outputs are judged: by what they do to the layer's output, or to the model's
loss."""


@dataclass(frozen=True)
class QuantizeOptions:
    """Options that decide what becomes of the experts.

    ``own`` are options that only the format has, by their names in `erniequant.quantize`; the
    format checks them (`Format.check`). ``tune``, ``sensitivity`` and ``search`` are of
    `TUNE_MODES`, `SENSITIVITIES` and `SEARCHES`.
    """

    bits: int
    effort: str = "standard"
    max_tp: int = 2
    seed: int = 0
    format: str = "native"
    own: Mapping[str, Any] = field(default_factory=dict)
    tune: str = "none"
    sensitivity: str = "activation"
    search: str = "cpu"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ErnieQuantError(f"bits must be 2, 3 or 4, not {self.bits!r}")
        if self.effort not in EFFORTS:
            raise ErnieQuantError(
                f"effort must be one of {', '.join(EFFORTS)}, not {self.effort!r}"
            )
        for name, value, known in (
            ("tune", self.tune, TUNE_MODES), ("sensitivity", self.sensitivity, SENSITIVITIES),
            ("search", self.search, SEARCHES),
        ):  # fmt: skip
            if value not in known:
                raise ErnieQuantError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.max_tp < 1:
            raise ErnieQuantError(f"max-tp must be at least 1, not {self.max_tp}")


@dataclass(frozen=True)
class PlanWording:
    """A format's wording for what it does with tensors: one line for each code, how other tensors
    arrive (``copy``, ``unchanged``), and what becomes of multi-token prediction."""

    codes: tuple[str, ...]
    verb: str
    manner: str
    mtp: str


@dataclass(frozen=True)
class Plan:
    """The fate of every tensor, and the size of the result.

    ``packed`` are the tensors that take the place of ``quantized``; ``mtp`` those of ``copied``
    that transformers does not run. ``expert_bytes`` and ``copied_bytes`` are those of the output;
    ``source_bytes`` of the input. ``groups`` is the same list of tensors for people to read.
    ``settings`` are the codes as JSON, ``wording`` the format's words for all this.
    """

    model: ModelSizes
    options: QuantizeOptions
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
    settings: Mapping[str, Any]
    wording: PlanWording

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


Contents = Callable[
    [tuple[str, ...]], tuple[tuple[OutputTensor, ...], int, Mapping[str, Any], PlanWording]
]
"""Takes the names of the tensors that are not quantised; returns the tensors that hold experts, the
bytes of all others, the codes as JSON, and the wording."""


def make_plan(
    checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions, contents: Contents
) -> Plan:
    """Decide what happens to every tensor of ``checkpoint``.

    contents: makes what depends on the format; asked after everything else is known to be whole.

    Raises:
        ErnieQuantError: a tensor is missing, has another shape, or is unknown, or the format cannot
            hold the model.
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
    expected = {*expert_names, *model.required(), _HEAD}
    for line in fused_experts(checkpoint.headers, model, str(checkpoint.folder)):
        raise ErnieQuantError(line)
    for name in checkpoint.names():
        if name not in expected and not _MTP.fullmatch(name):
            raise ErnieQuantError(not_part_of(name, model))
    for line in tensor_misfits(model, checkpoint.headers):
        raise ErnieQuantError(line)
    copied = tuple(name for name in checkpoint.names() if name not in expert_names)
    packed, copied_bytes, settings, wording = contents(copied)
    return Plan(
        sizes,
        options,
        quantized,
        copied,
        tuple(name for name in copied if _MTP.fullmatch(name)),
        packed,
        expert_weights=sum(checkpoint.header(name).elements for name in quantized),
        total_weights=sum(header.elements for header in checkpoint.headers.values()),
        source_bytes=checkpoint.total_bytes,
        expert_bytes=sum(tensor.n_bytes for tensor in packed),
        copied_bytes=copied_bytes,
        groups=tensor_groups(checkpoint, quantized, copied, _tuned(model, options.tune, copied)),
        settings=settings,
        wording=wording,
    )


def _tuned(model: Architecture, tune: str, names: tuple[str, ...]) -> frozenset[str]:
    """Those of the tensors that training may change."""
    layers = {"none": (), "layer": model.sizes.moe_layers, "model": range(model.sizes.layers)}
    prefixes = tuple(f"model.layers.{index}." for index in layers[tune])
    found = {n for n in names if n.startswith(prefixes) and not model.optional(n)}
    return frozenset(found | ({NORM} & set(names) if tune == "model" else set()))
