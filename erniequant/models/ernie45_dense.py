"""ERNIE 4.5 without experts, for example 0.3B: every MLP is quantised as a layer's only expert."""

from typing import Any

import torch
from torch import nn

from erniequant.models.architecture import (
    Architecture,
    ExpertGroup,
    ModelSizes,
    MoeInput,
)
from erniequant.packing.layer_keys import MLP


class Ernie45Dense(Architecture):
    """`Ernie4_5ForCausalLM`."""

    model_type = "ernie4_5"
    description = "ERNIE 4.5 dense text model"
    model_class = "Ernie4_5ForCausalLM"
    # A mixture of experts has another class in its dense layers.
    stock_module = "Ernie4_5MLP"
    slots = (MLP,)
    matrix_pattern = "mlp.{matrix}.weight"
    expert_count_keys = ()
    inner_size_key = "intermediate_size"

    def _read_sizes(self) -> ModelSizes:
        config = self.config
        layers = config.num_hidden_layers
        return ModelSizes(
            config.hidden_size,
            (ExpertGroup(MLP.name, 1, config.intermediate_size),),
            top_k=1,
            layers=layers,
            moe_layers=tuple(range(layers)),
            vocabulary=config.vocab_size,
        )

    @classmethod
    def config_class(cls) -> type[Any]:
        from transformers import Ernie4_5Config

        return Ernie4_5Config

    def route(
        self, layer: Any, hidden: torch.Tensor, vision: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MoeInput]:
        x = layer.post_attention_layernorm(hidden)[0]
        everything = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        return hidden, MoeInput(x, everything, torch.ones(x.shape[0], 1, device=x.device))

    def _empty_layer(self, index: int) -> Any:
        from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5DecoderLayer

        with torch.device("meta"):
            layer = Ernie4_5DecoderLayer(self.config, index)
            layer.mlp = nn.Identity()
        return layer

    def _rotary(self) -> Any:
        from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5RotaryEmbedding

        return Ernie4_5RotaryEmbedding(self.config)
