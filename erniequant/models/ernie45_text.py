"""ERNIE 4.5 text mixture-of-experts: its sizes, tensor names on disk, and its layers run one at a
time.

The layers are transformers' own modules, built without memory and filled from the checkpoint, so
attention, norms and routing (float32 softmax, bias for selection only, clamped normalisation) are
the stock ones. Experts are never part of them: the caller streams experts one by one.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Ernie4_5_MoeConfig
from transformers.activations import ACT2FN
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeDecoderLayer,
    Ernie4_5_MoeRotaryEmbedding,
)

from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.models.settings import require_harmless

MODEL_TYPE = "ernie4_5_moe"
EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")


class TensorSource(Protocol):
    """Where tensors come from by their name on disk."""

    def names(self) -> Any:
        """All tensor names."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype."""


@dataclass(frozen=True)
class TextMoe:
    """Sizes of a text MoE and the layers that have experts."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int
    moe_layers: tuple[int, ...]
    vocabulary: int

    @classmethod
    def from_config(cls, config: Ernie4_5_MoeConfig) -> "TextMoe":
        """Read the sizes from a transformers config.

        Raises:
            ErnieQuantError: no layer has experts.
        """
        last = config.moe_layer_end_index
        moe_layers = tuple(
            i
            for i in range(config.num_hidden_layers)
            if (i + 1) % config.moe_layer_interval == 0
            and config.moe_layer_start_index <= i <= last
        )
        if not moe_layers:
            raise ErnieQuantError(
                "config.json describes no layer with experts; nothing to quantise"
            )
        return cls(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.num_hidden_layers,
            moe_layers,
            config.vocab_size,
        )


def expert_matrix_name(layer: int, expert: int, matrix: str) -> str:
    """Baidu's name of one expert matrix on disk (``matrix``: one of `EXPERT_MATRICES`)."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"


def experts_prefix(layer: int) -> str:
    """Prefix of the fused tensors of a layer's experts."""
    return f"model.layers.{layer}.mlp.experts."


def read_config(settings: dict[str, Any]) -> Ernie4_5_MoeConfig:
    """The transformers config for the contents of a config.json.

    Raises:
        ErnieQuantError: another architecture, or already quantised.
    """
    found = settings.get("model_type")
    if found != MODEL_TYPE:
        raise ErnieQuantError(
            f"config.json says model_type {found!r}; supported: {MODEL_TYPE} (ERNIE 4.5 text MoE)"
        )
    if "quantization_config" in settings:
        raise ErnieQuantError(
            "the source is already quantised (config.json has quantization_config); give the "
            "bf16 checkpoint"
        )
    config = text_config(settings)
    config._attn_implementation = "sdpa"
    return config


def text_config(settings: dict[str, Any]) -> Ernie4_5_MoeConfig:
    """What transformers reads from the contents of a config.json; ErnieQuantError if it cannot."""
    require_harmless(settings)
    with foreign_errors(f"config.json is not a valid {MODEL_TYPE} config"):
        # A copy: transformers rewrites nested settings in place.
        config = Ernie4_5_MoeConfig(**copy.deepcopy(settings))
        if config.hidden_act not in ACT2FN:
            raise ErnieQuantError(f"config.json has hidden_act {config.hidden_act!r}; unknown")
        return config


def position_embeddings(config: Ernie4_5_MoeConfig, length: int, device: torch.device) -> Any:
    """Rotary cosine and sine of positions ``0..length-1``."""
    rotary = Ernie4_5_MoeRotaryEmbedding(config).to(device)
    return rotary(torch.zeros(1, device=device), torch.arange(length, device=device)[None])


def load_layer(
    source: TensorSource, config: Ernie4_5_MoeConfig, index: int, device: torch.device
) -> Any:
    """A decoder layer in float32 without its experts.

    Raises:
        ErnieQuantError: a tensor of the layer is missing or has another shape.
    """
    with torch.device("meta"):
        layer = Ernie4_5_MoeDecoderLayer(config, index)
    if hasattr(layer.mlp, "experts"):
        layer.mlp.experts = nn.Identity()
    state = {}
    for name, parameter in layer.state_dict().items():
        disk = f"model.layers.{index}.{name}".replace("mlp.gate.moe_statics.", "mlp.moe_statics.")
        tensor = source.tensor(disk)
        if tensor.shape != parameter.shape:
            raise ErnieQuantError(
                f"{disk} has shape {tuple(tensor.shape)}, but config.json asks for "
                f"{tuple(parameter.shape)}"
            )
        state[name] = tensor.to(device=device, dtype=torch.float32)
    layer.load_state_dict(state, assign=True)
    return layer.eval().requires_grad_(False)


def attend(layer: Any, hidden: torch.Tensor, positions: Any) -> torch.Tensor:
    """Hidden states ``[1, T, H]`` of one text after the layer's attention, causal, without
    padding."""
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=positions,
        attention_mask=None,
    )
    return hidden + attended


@dataclass(frozen=True, eq=False)
class MoeInput:
    """What a layer's experts see for one text: inputs ``[T, H]``, expert ids and routing weights
    ``[T, k]``."""

    x: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor

    def routed_to(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of an expert's tokens, ascending, and their routing weights in float32."""
        rows, slot = torch.where(self.expert == expert)
        return rows, self.weight[rows, slot].float()


def route(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, MoeInput]:
    """Split a MoE layer after attention: hidden states ``[1, T, H]`` plus shared experts, and the
    experts' input."""
    x = layer.post_attention_layernorm(hidden)[0]
    _, weight, expert = layer.mlp.gate(x)
    if layer.mlp.shared_experts is not None:
        hidden = hidden + layer.mlp.shared_experts(x)
    return hidden, MoeInput(x, expert, weight)


def dense_mlp(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states ``[1, T, H]`` after the MLP of a layer without experts."""
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
