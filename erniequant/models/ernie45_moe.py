"""ERNIE 4.5 text mixture-of-experts: 21B-A3B, 300B-A47B and their kin.

Routing is transformers' own (float32 softmax, bias for selection only, clamped normalisation).
"""

from typing import Any

import torch
from torch import nn
from transformers import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeDecoderLayer,
    Ernie4_5_MoeRotaryEmbedding,
)

from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import (
    Architecture,
    ExpertGroup,
    ModelSizes,
    MoeInput,
    read_settings,
)

BIAS = "e_score_correction_bias"


class Ernie45Moe(Architecture):
    """`Ernie4_5_MoeForCausalLM`."""

    model_type = "ernie4_5_moe"
    description = "ERNIE 4.5 text MoE"

    def __init__(self, settings: dict[str, Any]):
        """Read a config.json. Raises ErnieQuantError if it is not valid or has no experts."""
        config = read_settings(Ernie4_5_MoeConfig, settings, self.model_type)
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
        sizes = ModelSizes(
            config.hidden_size,
            (ExpertGroup("", config.num_experts, config.moe_intermediate_size),),
            config.num_experts_per_tok,
            config.num_hidden_layers,
            moe_layers,
            config.vocab_size,
        )
        super().__init__(config, sizes)

    def expert_matrix_name(self, layer: int, expert: int, matrix: str) -> str:
        return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"

    def disk_name(self, layer: int, name: str) -> str:
        return super().disk_name(layer, name).replace("mlp.gate.moe_statics.", "mlp.moe_statics.")

    def optional(self, name: str) -> bool:
        # Models trained without it do not store it; transformers uses zeros as well.
        return name.endswith(BIAS)

    def route(
        self, layer: Any, hidden: torch.Tensor, vision: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MoeInput]:
        x = layer.post_attention_layernorm(hidden)[0]
        _, weight, expert = layer.mlp.gate(x)
        if layer.mlp.shared_experts is not None:
            hidden = hidden + layer.mlp.shared_experts(x)
        return hidden, MoeInput(x, expert, weight)

    def _empty_layer(self, index: int) -> Any:
        with torch.device("meta"):
            layer = Ernie4_5_MoeDecoderLayer(self.config, index)
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = nn.Identity()
        return layer

    def _rotary(self) -> Any:
        return Ernie4_5_MoeRotaryEmbedding(self.config)
