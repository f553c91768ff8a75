"""ERNIE 4.5 vision-language mixture-of-experts, such as VL-28B-A3B: two sets of experts in a layer,
one for text tokens and one for image tokens.

On disk, experts of both sets are numbered one after the other, text first, and both routers are
stored transposed.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import (
    Architecture,
    ExpertGroup,
    ModelSizes,
    MoeInput,
    Shapes,
    TensorSource,
)
from erniequant.models.ernie45_moe import BIAS
from erniequant.models.images import ImageSettings
from erniequant.models.settings import require_possible_vision
from erniequant.models.vl_config import MODEL_CLASS, MODEL_TYPE, in_terms_of_transformers
from erniequant.packing.layer_keys import TEXT_EXPERTS, VISION_EXPERTS

TEXT, VISION = TEXT_EXPERTS.name, VISION_EXPERTS.name


class Ernie45Vl(Architecture):
    """`Ernie4_5_VLMoeForConditionalGeneration`."""

    model_type = MODEL_TYPE
    description = "ERNIE 4.5 vision-language MoE"
    model_class = MODEL_CLASS
    auto_class = "AutoModelForImageTextToText"
    stock_module = "Ernie4_5_VLMoeMoeExperts"
    slots = (TEXT_EXPERTS, VISION_EXPERTS)
    optional_tensors = (BIAS,)
    processor_classes = "Ernie4_5_VLMoe"

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self.images = self.image_settings(self.whole)
        self._tower_prefix = "vision_model."

    def _read_sizes(self) -> ModelSizes:
        require_possible_vision(self.whole)
        text = self.config
        moe_layers = tuple(i for i, kind in enumerate(text.mlp_layer_types) if kind == "sparse")
        if not moe_layers:
            raise ErnieQuantError(
                "config.json describes no layer with experts; nothing to quantise"
            )
        experts, (inner, inner_vision) = text.moe_num_experts, text.moe_intermediate_size
        return ModelSizes(
            text.hidden_size,
            (
                ExpertGroup(TEXT, experts, inner),
                ExpertGroup(VISION, experts, inner_vision, first=experts),
            ),
            text.moe_k,
            text.num_hidden_layers,
            moe_layers,
            text.vocab_size,
        )

    def adapt(self, names: Collection[str]) -> Architecture:
        # transformers writes it so when it saves a model.
        if any(name.startswith("model.vision_model.") for name in names):
            self._tower_prefix = "model.vision_model."
        return self

    @classmethod
    def config_class(cls) -> type[Any]:
        from transformers import Ernie4_5_VLMoeConfig

        return Ernie4_5_VLMoeConfig

    @classmethod
    def in_terms_of_transformers(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return in_terms_of_transformers(settings)

    @classmethod
    def image_settings(cls, config: Any) -> ImageSettings | None:
        vision = config.vision_config
        return ImageSettings(
            config.image_start_token_id,
            config.image_token_id,
            config.image_end_token_id,
            vision.patch_size,
            vision.spatial_merge_size,
            vision.in_channels,
        )

    def disk_name(self, layer: int, name: str) -> str:
        for group, router in ((TEXT, "weight"), (VISION, "weight_1")):
            if name == f"mlp.{group}.gate.weight":
                return super().disk_name(layer, f"mlp.gate.{router}")
        if name.endswith(BIAS):
            return super().disk_name(layer, f"mlp.moe_statics.{BIAS}")
        return super().disk_name(layer, name)

    def disk_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name.endswith("moe.gate.weight"):
            return shape[::-1]
        return (2, *shape[1:]) if name.endswith(BIAS) else shape

    def from_disk(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("moe.gate.weight"):
            return tensor.T.contiguous()
        if name.endswith(BIAS):
            row = 1 if f".{VISION}." in name else 0
            return tensor[row : row + 1]
        return tensor

    def to_disk(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.T.contiguous() if name.endswith("moe.gate.weight") else parameter

    def route(
        self, layer: Any, hidden: torch.Tensor, vision: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MoeInput]:
        x = layer.post_attention_layernorm(hidden)[0]
        expert = torch.zeros(x.shape[0], self.sizes.top_k, dtype=torch.int64, device=x.device)
        weight = torch.zeros(x.shape[0], self.sizes.top_k, device=x.device)
        of_image = torch.zeros(x.shape[0], dtype=torch.bool) if vision is None else vision
        rows_of = {TEXT: torch.where(~of_image)[0], VISION: torch.where(of_image)[0]}
        for group in self.sizes.groups:
            rows = rows_of[group.name].to(x.device)
            router = getattr(layer.mlp, group.name).gate
            _, chosen_weight, chosen = router(x[rows])
            expert[rows] = chosen + group.first
            weight[rows] = chosen_weight.float()
        if layer.mlp.shared_experts is not None:
            hidden = hidden + layer.mlp.shared_experts(x)
        return hidden, MoeInput(x, expert, weight)

    def embed_images(
        self,
        source: TensorSource,
        patches: torch.Tensor,
        grid: torch.Tensor,
        device: torch.device,
    ) -> torch.Tensor:
        from erniequant.models.vision_tower import embed_images

        return embed_images(
            self.whole, self._tower_prefix, source.tensor, patches, grid, device
        ).cpu()

    def image_bytes(self, patches: int) -> int:
        vision, merge = self.whole.vision_config, self.images.merge if self.images else 1
        # Per patch: queries, keys, values and their rotated copies; the MLP, twice.
        tower = 4 * patches * (9 * vision.hidden_size + 2 * vision.intermediate_size)
        wide = vision.hidden_size * merge**2
        resampler = 4 * (patches // merge**2) * 6 * wide
        # The resampler as it is stored: four square matrices, one of them twice as wide.
        weights = 2 * (5 * wide**2 + wide * self.sizes.hidden)
        return weights + max(tower, resampler)

    def position_embeddings(self, positions: torch.Tensor, device: torch.device) -> Any:
        return super().position_embeddings(positions.expand(3, 1, -1), device)

    def _other_parts(self) -> Shapes:
        from erniequant.models.vision_tower import required_tensors

        return required_tensors(self.whole, self._tower_prefix)

    def _head_bias(self) -> bool:
        return False

    def _empty_layer(self, index: int) -> Any:
        from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
            Ernie4_5_VLMoeDecoderLayer,
        )

        with torch.device("meta"):
            layer: Any = Ernie4_5_VLMoeDecoderLayer(self.config, index)
        if index in self.sizes.moe_layers:
            for group in self.sizes.groups:
                getattr(layer.mlp, group.name).experts = nn.Identity()
        return layer

    def _rotary(self) -> Any:
        from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
            Ernie4_5_VLMoeTextRotaryEmbedding,
        )

        return Ernie4_5_VLMoeTextRotaryEmbedding(self.config)
