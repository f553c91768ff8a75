"""vLLM's vision-language ERNIE 4.5, for checkpoints in transformers' form, quantised or not.

It loads packed experts, whose names the hand-written loader of vLLM's class takes for others, and
routes the tokens around an image as transformers does.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.models.ernie45_vl import Ernie4_5_VLMoeForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from erniequant.models.ernie45_vl import Ernie45Vl
from erniequant.packing.layer_keys import layer_key_of
from erniequant.serving.vllm.experts import PackedExpertsMethod
from erniequant.serving.vllm.loading import require_loaded
from erniequant.serving.vllm.quantization_config import path_in_format
from erniequant.serving.vllm.vision_processor import DummyImages, ImageInfo, ImageProcessor

Weights = Iterable[tuple[str, torch.Tensor]]


@MULTIMODAL_REGISTRY.register_processor(ImageProcessor, info=ImageInfo, dummy_inputs=DummyImages)
class ErnieQuantVLMoe(Ernie4_5_VLMoeForConditionalGeneration):
    """Registered under `vision_config.ARCHITECTURE`."""

    visual_token_mask: torch.Tensor | None
    # transformers puts the tower inside of the model when it saves it.
    hf_to_vllm_mapper = (
        WeightsMapper(orig_to_new_prefix={"model.vision_model.": "vision_model."})
        | Ernie4_5_VLMoeForConditionalGeneration.hf_to_vllm_mapper
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """An image in the text of a message, where the chat template takes no parts."""
        if modality.startswith("image"):
            return "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
        raise ValueError("a message may have images beside text, nothing else")

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Embeddings; also notes which tokens belong to images.

        vLLM notes them only in steps with a part of an image, but the tokens before and after it go
        to the vision experts too, and may be in another step than it.
        """
        embeddings = super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        self._set_visual_token_mask(input_ids)
        return embeddings

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Hidden states ``[T, H]``."""
        mask, tokens = self.visual_token_mask, positions.shape[-1]
        if mask is not None and (_is_captured() or len(mask) > tokens or not mask.any()):
            # Text alone needs no mask, without which layers do not ask the GPU about it.
            self.visual_token_mask = None
        return super().forward(input_ids, positions, *args, **kw)

    def load_weights(self, weights: Weights) -> set[str]:
        """Names of the parameters that were loaded.

        Raises:
            ErnieQuantError: one was not, or a packed tensor does not fit. vLLM looks for missing
                ones only where nothing is quantised.
        """
        packed: set[str] = set()
        loaded = super().load_weights(self._without_packed(weights, packed)) | packed
        for name, parameter in self.named_parameters():
            if Ernie45Vl.optional(name) and name not in loaded:
                parameter.data.zero_()  # vLLM leaves it uninitialised
                loaded.add(name)
        require_loaded(self, loaded, [path for path, _ in self._packed_modules()])
        return loaded

    def _without_packed(self, weights: Weights, packed: set[str]) -> Iterator[Any]:
        """Load the experts of quantised layers, and pass on all other tensors."""
        modules = {
            layer_key_of(path_in_format(path)): (path, module)
            for path, module in self._packed_modules()
        }
        quantized = getattr(self.language_model.quant_config, "metadata", None)
        for name, tensor in weights:
            key = layer_key_of(name)
            if quantized is None or key not in quantized.layers:
                yield name, tensor
            elif key in modules:  # else on another rank of pipeline parallelism
                path, module = modules[key]
                one = [(name.rpartition(".")[2], tensor)]
                packed.update(f"{path}.{loaded}" for loaded in module.load_weights(one))

    def _packed_modules(self) -> Iterator[tuple[str, Any]]:
        for path, module in self.named_modules():
            if isinstance(module, RoutedExperts) and isinstance(
                module.quant_method, PackedExpertsMethod
            ):
                yield path, module


def _is_captured() -> bool:
    """True while a CUDA graph is being made, which is for generated tokens: these are text."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
