"""ERNIE 4.5 without experts, for example 0.3B: every MLP is quantised as a layer's only expert."""

from typing import Any

import torch
from torch import nn
from transformers import Ernie4_5Config
from transformers.models.ernie4_5.modeling_ernie4_5 import (
    Ernie4_5DecoderLayer,
    Ernie4_5RotaryEmbedding,
)

from erniequant.models.architecture import (
    Architecture,
    ExpertGroup,
    ModelSizes,
    MoeInput,
    read_settings,
)


class Ernie45Dense(Architecture):
    """`Ernie4_5ForCausalLM`."""

    model_type = "ernie4_5"
    description = "ERNIE 4.5 dense text model"

    def __init__(self, settings: dict[str, Any]):
        """Read a config.json. Raises ErnieQuantError if it is not valid."""
        config = read_settings(Ernie4_5Config, settings, self.model_type)
        layers = config.num_hidden_layers
        sizes = ModelSizes(
            config.hidden_size,
            (ExpertGroup("mlp", 1, config.intermediate_size),),
            top_k=1,
            layers=layers,
            moe_layers=tuple(range(layers)),
            vocabulary=config.vocab_size,
        )
        super().__init__(config, sizes)

    def expert_matrix_name(self, layer: int, expert: int, matrix: str) -> str:
        return f"model.layers.{layer}.mlp.{matrix}.weight"

    def route(
        self, layer: Any, hidden: torch.Tensor, vision: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MoeInput]:
        x = layer.post_attention_layernorm(hidden)[0]
        everything = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        return hidden, MoeInput(x, everything, torch.ones(x.shape[0], 1, device=x.device))

    def _empty_layer(self, index: int) -> Any:
        with torch.device("meta"):
            layer = Ernie4_5DecoderLayer(self.config, index)
            layer.mlp = nn.Identity()
        return layer

    def _rotary(self) -> Any:
        return Ernie4_5RotaryEmbedding(self.config)
