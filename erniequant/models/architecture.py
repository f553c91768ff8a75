"""The facts about a model that quantisation needs: sizes, tensor names on disk, and its decoder
layers run one at a time.

The layers are transformers' own modules, built without memory and filled from the checkpoint, so
attention, norms and routing are the stock ones. Matrices that are quantised are never part of
them: the caller streams these expert by expert.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.models.images import ImageSettings
from erniequant.models.linear import StoredLinear, store_linears
from erniequant.models.settings import require_harmless, require_possible
from erniequant.packing.layer_keys import EXPERTS, Slot

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


class TensorSource(Protocol):
    """A source of tensors by their names on disk."""

    def names(self) -> list[str]:
        """All tensor names."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype."""


@dataclass(frozen=True)
class ExpertGroup:
    """Experts of a layer that are alike: a token chooses all of its experts from one group.

    ``name`` is how keys of `quantization_config` name the group, empty for a layer's only one;
    ``first`` is the number of its first expert among all of a layer, as they are numbered on disk.
    """

    name: str
    experts: int
    inner: int
    first: int = 0

    def layer_key(self, layer: int) -> str:
        """The key of the group in a layer."""
        return f"{layer}.{self.name}" if self.name else str(layer)

    @property
    def numbers(self) -> range:
        """Numbers of its experts within a layer."""
        return range(self.first, self.first + self.experts)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model and the layers whose MLP is quantised; a dense MLP counts as one expert."""

    hidden: int
    groups: tuple[ExpertGroup, ...]
    top_k: int
    layers: int
    moe_layers: tuple[int, ...]
    vocabulary: int

    @property
    def experts(self) -> int:
        """Experts of a layer, of all groups."""
        return sum(group.experts for group in self.groups)

    def group_of(self, expert: int) -> ExpertGroup:
        """The group that an expert of a layer is in."""
        return next(group for group in self.groups if expert in group.numbers)


@dataclass(frozen=True, eq=False)
class MoeInput:
    """Inputs ``[T, H]`` of a layer's experts, with expert ids and routing weights ``[T, k]``."""

    x: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor

    def rows_of(self, group: ExpertGroup) -> torch.Tensor:
        """Rows of the tokens that chose from a group, ascending."""
        chosen = self.expert[:, 0]
        return torch.where((chosen >= group.first) & (chosen < group.numbers.stop))[0]

    def routed_to(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of an expert's tokens, ascending, and their routing weights in float32."""
        rows, slot = torch.where(self.expert == expert)
        # Rows are a view of a table that holds the slots too.
        return rows.clone(), self.weight[rows, slot].float()


class Architecture(ABC):
    """One model with its config. Its class is the family, whose facts are the class's attributes;
    the values here are those of a mixture of experts.

    Attributes:
        model_type: its name in config.json.
        description: its name in messages.
        model_class: the name of transformers' class of the whole model.
        auto_class: the name of transformers' class that loads it.
        stock_module: the name of transformers' class that a packed module replaces.
        slots: places in a layer that take packed tensors, in the order in which checkpoints number
            their experts.
        matrix_pattern: name on disk of one matrix within a layer, with ``{expert}`` (numbered
            through all slots) and ``{matrix}``.
        expert_count_keys: config.json has the number of experts under the first of these that is
            there.
        inner_size_key: config.json has the inner size of experts under it, or a list of two, one
            for each slot.
        optional_tensors: tensors with such endings may be missing, and are zero then.
        processor_classes: names of transformers' classes for its processors begin with it.
        whole: the config in transformers.
        config: its part for the decoder.
        sizes: see `ModelSizes`.
        images: its image settings, None for a text-only model.
    """

    model_type: ClassVar[str]
    description: ClassVar[str]
    model_class: ClassVar[str]
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    stock_module: ClassVar[str]
    slots: ClassVar[tuple[Slot, ...]] = (EXPERTS,)
    matrix_pattern: ClassVar[str] = "mlp.experts.{expert}.{matrix}.weight"
    expert_count_keys: ClassVar[tuple[str, ...]] = ("moe_num_experts", "num_experts")
    inner_size_key: ClassVar[str] = "moe_intermediate_size"
    optional_tensors: ClassVar[tuple[str, ...]] = ()
    processor_classes: ClassVar[str | None] = None
    images: ImageSettings | None = None

    def __init__(self, settings: dict[str, Any]):
        """Read a config.json.

        Raises:
            ErnieQuantError: it is not valid, or has nothing to quantise.
        """
        self.whole = read_settings(type(self), self.in_terms_of_transformers(settings))
        self.config = self.whole.get_text_config()
        self.config._attn_implementation = "sdpa"
        self.sizes = self._read_sizes()
        self._required: Shapes | None = None

    @classmethod
    @abstractmethod
    def config_class(cls) -> type[Any]:
        """The config class in transformers."""

    @classmethod
    def is_dense(cls) -> bool:
        """True if its MLPs take the place of experts."""
        return any(slot.dense for slot in cls.slots)

    @classmethod
    def expert_count(cls, settings: Mapping[str, Any]) -> Any:
        """The number of experts in the decoder's part of a config.json, None if it gives none."""
        return next((settings[key] for key in cls.expert_count_keys if key in settings), None)

    @classmethod
    def in_terms_of_transformers(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """The config.json that transformers reads, where the family has another form of its own.

        Raises:
            ErnieQuantError: it cannot be translated.
        """
        return settings

    @classmethod
    def image_settings(cls, config: Any) -> ImageSettings | None:
        """Image settings of the model of a transformers config; None for a text-only model."""
        return None

    @classmethod
    def optional(cls, name: str) -> bool:
        """True if a required tensor may be missing, and is zero then."""
        return name.endswith(cls.optional_tensors)

    @classmethod
    def name_in_memory(cls, name: str) -> str:
        """The name that transformers gives in memory to the tensor with this name on disk."""
        return name

    def expert_matrix_name(self, layer: int, expert: int, matrix: str) -> str:
        """Name on disk of one matrix (``matrix``: one of `EXPERT_MATRICES`)."""
        return f"model.layers.{layer}." + self.matrix_pattern.format(expert=expert, matrix=matrix)

    @abstractmethod
    def _read_sizes(self) -> ModelSizes:
        """From the config. Raises ErnieQuantError where it has nothing to quantise."""

    @abstractmethod
    def route(
        self, layer: Any, hidden: torch.Tensor, vision: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MoeInput]:
        """Split a quantised layer after attention: hidden states ``[1, T, H]`` with everything
        added but the experts' outputs, and the experts' input.

        vision: bool ``[T]``, true for image tokens, in models that tell them apart; None means
        none.
        """

    @abstractmethod
    def _empty_layer(self, index: int) -> Any:
        """A decoder layer on the meta device, without the matrices that are quantised."""

    @abstractmethod
    def _rotary(self) -> Any:
        """The module of position embeddings."""

    def adapt(self, names: Collection[str]) -> "Architecture":
        """Adopt the names of a checkpoint with these tensors where a tensor has two possible
        names."""
        return self

    def disk_name(self, layer: int, name: str) -> str:
        """Name on disk of a parameter of a layer."""
        return f"model.layers.{layer}.{name}"

    def disk_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on disk of a parameter of a layer that has ``shape`` in memory."""
        return shape

    def from_disk(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter of a layer from the tensor that holds it."""
        return tensor

    def to_disk(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Inverse of `from_disk`, for parameters that a tensor holds alone."""
        return parameter

    def required(self) -> Shapes:
        """Shapes of all tensors that the model has beside the quantised ones, by name on disk."""
        if self._required is not None:
            return self._required
        config = self.config
        embedding = (self.sizes.vocabulary, self.sizes.hidden)
        shapes: Shapes = {"model.embed_tokens.weight": embedding}
        for index in range(self.sizes.layers):
            for name, parameter in self._empty_layer(index).state_dict().items():
                shape = self.disk_shape(name, tuple(parameter.shape))
                shapes[self.disk_name(index, name)] = shape
        shapes["model.norm.weight"] = (self.sizes.hidden,)
        if not config.tie_word_embeddings:
            shapes["lm_head.weight"] = embedding
        if self._head_bias():
            shapes["lm_head.bias"] = (self.sizes.vocabulary,)
        self._required = shapes | self._other_parts()
        return self._required

    def _head_bias(self) -> bool:
        return bool(self.config.use_bias)

    def _other_parts(self) -> Shapes:
        """Shapes of what the model has beside its decoder."""
        return {}

    def load_layer(self, source: TensorSource, index: int, device: torch.device) -> Any:
        """A decoder layer that computes in float32, without the matrices that are quantised.

        Weights of linear layers keep the type that they are stored in.

        Raises:
            ErnieQuantError: a tensor of the layer is missing or has another shape.
        """
        layer = self._empty_layer(index)
        store_linears(layer)
        stored = {f"{n}." for n, m in layer.named_modules() if isinstance(m, StoredLinear)}
        present = set(source.names())
        state = {}
        for name, parameter in layer.state_dict().items():
            disk = self.disk_name(index, name)
            if disk not in present and self.optional(disk):
                state[name] = torch.zeros(parameter.shape, device=device)
                continue
            tensor = source.tensor(disk)
            shape = self.disk_shape(name, tuple(parameter.shape))
            if tuple(tensor.shape) != shape:
                raise ErnieQuantError(
                    f"{disk} has shape {tuple(tensor.shape)}, but config.json asks for {shape}"
                )
            tensor = self.from_disk(name, tensor)
            keep = f"{name.rpartition('.')[0]}." in stored
            state[name] = tensor.to(device=device, dtype=tensor.dtype if keep else torch.float32)
        layer.load_state_dict(state, assign=True)
        return layer.eval().requires_grad_(False)

    def position_embeddings(self, positions: torch.Tensor, device: torch.device) -> Any:
        """Rotary cosine and sine of positions, int64 ``[1, T]``, or ``[3, 1, T]`` in models that
        take images."""
        return self._rotary().to(device)(torch.zeros(1, device=device), positions.to(device))

    def attend(
        self, layer: Any, hidden: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states ``[1, T, H]`` of one text after the layer's attention, causal, without
        padding.

        positions: int64 ``[3, T]``, of a text with images; None counts from 0.
        """
        where = torch.arange(hidden.shape[1]) if positions is None else positions
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.position_embeddings(where.unsqueeze(-2), hidden.device),
            attention_mask=None,
        )
        return hidden + attended

    def embed_images(
        self,
        source: TensorSource,
        patches: torch.Tensor,
        grid: torch.Tensor,
        device: torch.device,
    ) -> torch.Tensor:
        """Embeddings float32 ``[P / merge**2, H]`` of the image tokens, on the CPU.

        Args:
            patches: patches of all images, float32 ``[P, C * patch * patch]``.
            grid: int64 ``[images, 3]``: time, height and width of each in patches.

        Raises:
            ErnieQuantError: the model takes no images.
        """
        raise ErnieQuantError(f"an {self.description} takes no images")

    def image_bytes(self, patches: int) -> int:
        """Peak bytes of passing ``patches`` patches through the vision tower at once."""
        return 0

    def dense_mlp(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[1, T, H]`` after the MLP of a layer that is not quantised."""
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def read_settings(family: type[Architecture], settings: dict[str, Any]) -> Any:
    """The transformers config of a family for the contents of a config.json.

    Raises:
        ErnieQuantError: transformers refuses it, it is harmful, or its sizes make no model.
    """
    from transformers.activations import ACT2FN

    require_harmless(settings)
    with wrap_errors(f"config.json is not a valid {family.model_type} config"):
        # A copy: transformers rewrites nested settings in place.
        config = family.config_class()(**copy.deepcopy(settings))
        decoder = config.get_text_config()
        if decoder.hidden_act not in ACT2FN:
            raise ErnieQuantError(f"config.json has hidden_act {decoder.hidden_act!r}; unknown")
    require_possible(decoder)
    return config
