"""ERNIE 4.5 text mixture-of-experts: 21B-A3B, 300B-A47B and their kin.

Routing is transformers' own (float32 softmax, bias for selection only, clamped normalisation).
"""

from typing import Any

import torch
from torch import nn

from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import (
    Architecture,
    ExpertGroup,
    ModelSizes,
    MoeInput,
)
from erniequant.packing.layer_keys import EXPERTS

BIAS = "e_score_correction_bias"
"""Bias of routers. Models trained without it do not store it; transformers uses zeros as well."""


class Ernie45Moe(Architecture):
    """`Ernie4_5_MoeForCausalLM`."""

    model_type = "ernie4_5_moe"
    description = "ERNIE 4.5 text MoE"
    model_class = "Ernie4_5_MoeForCausalLM"
    stock_module = "Ernie4_5_MoeExperts"
    optional_tensors = (BIAS,)

    def _read_sizes(self) -> ModelSizes:
        config = self.config
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
        return ModelSizes(
            config.hidden_size,
            (ExpertGroup(EXPERTS.name, config.num_experts, config.moe_intermediate_size),),
            config.num_experts_per_tok,
            config.num_hidden_layers,
            moe_layers,
            config.vocab_size,
        )

    @classmethod
    def config_class(cls) -> type[Any]:
        from transformers import Ernie4_5_MoeConfig

        return Ernie4_5_MoeConfig

    @classmethod
    def name_in_memory(cls, name: str) -> str:
        return name.replace(".mlp.moe_statics.", ".mlp.gate.moe_statics.")

    def disk_name(self, layer: int, name: str) -> str:
        return super().disk_name(layer, name).replace("mlp.gate.moe_statics.", "mlp.moe_statics.")

    def route(
        self, layer: Any, hidden: torch.Tensor, vision: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MoeInput]:
        x = layer.post_attention_layernorm(hidden)[0]
        _, weight, expert = layer.mlp.gate(x)
        if layer.mlp.shared_experts is not None:
            hidden = hidden + layer.mlp.shared_experts(x)
        return hidden, MoeInput(x, expert, weight)

    def _empty_layer(self, index: int) -> Any:
        from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeDecoderLayer

        with torch.device("meta"):
            layer = Ernie4_5_MoeDecoderLayer(self.config, index)
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = nn.Identity()
        return layer

    def _rotary(self) -> Any:
        from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
            Ernie4_5_MoeRotaryEmbedding,
        )

        return Ernie4_5_MoeRotaryEmbedding(self.config)
