"""What quantisation needs to know of a model: sizes, tensor names on disk, and its decoder layers
run one at a time.

The layers are transformers' own modules, built without memory and filled from the checkpoint, so
attention, norms and routing are the stock ones. Matrices that are quantised are never part of
them: the caller streams these expert by expert.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from transformers.activations import ACT2FN

from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.models.linear import StoredLinear, store_linears
from erniequant.models.settings import require_harmless, require_possible

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


class TensorSource(Protocol):
    """Where tensors come from by their name on disk."""

    def names(self) -> list[str]:
        """All tensor names."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model and the layers whose MLP is quantised; a dense MLP counts as one expert."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int
    moe_layers: tuple[int, ...]
    vocabulary: int


@dataclass(frozen=True, eq=False)
class MoeInput:
    """What a layer's experts see: inputs ``[T, H]``, expert ids and routing weights ``[T, k]``."""

    x: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor

    def routed_to(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of an expert's tokens, ascending, and their routing weights in float32."""
        rows, slot = torch.where(self.expert == expert)
        return rows, self.weight[rows, slot].float()


class Architecture(ABC):
    """One kind of model with its config.

    Attributes:
        config: of transformers.
        sizes: see `ModelSizes`.
    """

    model_type: ClassVar[str]
    description: ClassVar[str]

    def __init__(self, config: Any, sizes: ModelSizes):
        config._attn_implementation = "sdpa"
        self.config, self.sizes = config, sizes
        self._required: Shapes | None = None

    @abstractmethod
    def layer_key(self, layer: int) -> str:
        """The key of a quantised layer in `quantization_config`."""

    @abstractmethod
    def expert_matrix_name(self, layer: int, expert: int, matrix: str) -> str:
        """Name on disk of one matrix (``matrix``: one of `EXPERT_MATRICES`)."""

    @abstractmethod
    def route(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, MoeInput]:
        """Split a quantised layer after attention: hidden states ``[1, T, H]`` with everything
        added but the experts' outputs, and the experts' input."""

    @abstractmethod
    def _empty_layer(self, index: int) -> Any:
        """A decoder layer on the meta device, without the matrices that are quantised."""

    @abstractmethod
    def _rotary(self) -> Any:
        """The module of position embeddings."""

    def disk_name(self, layer: int, name: str) -> str:
        """Name on disk of a parameter of a layer."""
        return f"model.layers.{layer}.{name}"

    def optional(self, name: str) -> bool:
        """Whether a required tensor may be missing, and is zero then."""
        return False

    def required(self) -> Shapes:
        """Shapes of all tensors that the model has beside the quantised ones, by name on disk."""
        if self._required is not None:
            return self._required
        config = self.config
        embedding = (self.sizes.vocabulary, self.sizes.hidden)
        found: Shapes = {"model.embed_tokens.weight": embedding}
        for index in range(self.sizes.layers):
            for name, parameter in self._empty_layer(index).state_dict().items():
                found[self.disk_name(index, name)] = tuple(parameter.shape)
        found["model.norm.weight"] = (self.sizes.hidden,)
        if not config.tie_word_embeddings:
            found["lm_head.weight"] = embedding
        if config.use_bias:
            found["lm_head.bias"] = (self.sizes.vocabulary,)
        self._required = found
        return found

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
            if tensor.shape != parameter.shape:
                raise ErnieQuantError(
                    f"{disk} has shape {tuple(tensor.shape)}, but config.json asks for "
                    f"{tuple(parameter.shape)}"
                )
            keep = f"{name.rpartition('.')[0]}." in stored
            state[name] = tensor.to(device=device, dtype=tensor.dtype if keep else torch.float32)
        layer.load_state_dict(state, assign=True)
        return layer.eval().requires_grad_(False)

    def position_embeddings(self, length: int, device: torch.device) -> Any:
        """Rotary cosine and sine of positions ``0..length-1``."""
        rotary = self._rotary().to(device)
        return rotary(torch.zeros(1, device=device), torch.arange(length, device=device)[None])

    def attend(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[1, T, H]`` of one text after the layer's attention, causal, without
        padding."""
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.position_embeddings(hidden.shape[1], hidden.device),
            attention_mask=None,
        )
        return hidden + attended

    def dense_mlp(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[1, T, H]`` after the MLP of a layer that is not quantised."""
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def read_settings(kind: type[Any], settings: dict[str, Any], model_type: str) -> Any:
    """The transformers config of class ``kind`` for the contents of a config.json.

    Raises:
        ErnieQuantError: transformers refuses it, it does harm, or its sizes make no model.
    """
    require_harmless(settings)
    with foreign_errors(f"config.json is not a valid {model_type} config"):
        # A copy: transformers rewrites nested settings in place.
        config = kind(**copy.deepcopy(settings))
        if config.hidden_act not in ACT2FN:
            raise ErnieQuantError(f"config.json has hidden_act {config.hidden_act!r}; unknown")
    require_possible(config)
    return config
