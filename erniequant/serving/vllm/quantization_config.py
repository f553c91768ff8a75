"""The format in vLLM: which modules stay packed, and the checks before any weight is read."""

from functools import wraps
from typing import Any

import regex as re
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from erniequant.packing.layer_keys import GUARD, is_dense_key, layer_key_of
from erniequant.packing.schema import PROJECTIONS, QUANT_METHOD, QuantizationMetadata
from erniequant.serving.checkpoints import require_servable
from erniequant.serving.vllm.experts import PackedExpertsMethod, plain_experts
from erniequant.serving.vllm.linear import PackedLinearMethod

_REGISTERED = "_erniequant"


class PackedConfig(QuantizationConfig):
    """What the formats have in common."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those that there are kernels for: on a GPU, float32 would leave the captured graph."""
        exact = [torch.float32] if current_platform.is_cpu() else []
        return [torch.bfloat16, torch.float16, *exact]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: the kernels multiply bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says everything."""
        return []


class ErnieQuantVllmConfig(PackedConfig):
    """`quantization_config` of config.json as vLLM holds it. vLLM pickles it for its workers."""

    def __init__(self, metadata: QuantizationMetadata):
        super().__init__()
        self.metadata = metadata

    def get_name(self) -> str:
        """The name in config.json."""
        return QUANT_METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ErnieQuantVllmConfig":
        """Raises ErnieQuantError for what this version cannot decode."""
        return cls(QuantizationMetadata.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called before the model is built: refuse a checkpoint with a tensor missing, left over,
        or of another shape. vLLM looks for missing ones in unquantised models only.

        Raises:
            ErnieQuantError: names the first such tensor.
        """
        if revision is None:
            require_servable(model_name)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Names of dense models' tensors in vLLM, whose loader goes by modules; their guard goes.

        Static in vLLM, but always called on an instance, and twice for models like Llama.
        """
        packed = re.compile(r"\.mlp\.(gate_up|down)_proj_(packed|scale|signs)$")
        names: dict[Any, str | None] = {packed: r".mlp.\1_proj.\2"}
        for key in filter(is_dense_key, self.metadata.layers):
            index = key.partition(".")[0]
            names[re.compile(rf"(?:^|\.)layers\.{index}\.mlp\.{GUARD}\.weight$")] = None
        return WeightsMapper(orig_to_new_regex=names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What loads and multiplies the weights of a module; None leaves it to vLLM."""
        if isinstance(layer, RoutedExperts):
            key = layer_key_of(path_in_format(prefix))
            if key is None or key not in self.metadata.layers:
                return plain_experts(layer, prefix)
            return PackedExpertsMethod(layer.moe_config, self.metadata.layers[key], f"layer {key}")
        if isinstance(layer, LinearBase):
            name, key = prefix.rpartition(".")[2], layer_key_of(prefix, dense=True)
            packed = name in PROJECTIONS and prefix.endswith(f".mlp.{name}")
            if packed and key is not None and key in self.metadata.layers:
                return PackedLinearMethod(name, self.metadata.layers[key], f"layer {key}")
            return UnquantizedLinearMethod()
        return None


def path_in_format(prefix: str) -> str:
    """vLLM calls the experts of a vision-language layer text_experts and vision_experts."""
    return re.sub(r"\.mlp\.(text|vision)_experts\b", r".mlp.\1_moe.experts", prefix)


def register() -> None:
    """Add the format to vLLM's; calling it again does nothing."""
    convertor = ModelArchConfigConvertorBase
    if hasattr(convertor._normalize_quantization_config, _REGISTERED):
        return
    register_quantization_config(QUANT_METHOD)(ErnieQuantVllmConfig)
    convertor._normalize_quantization_config = _reading_producers(
        convertor._normalize_quantization_config
    )


def _reading_producers(original: Any) -> Any:
    """vLLM 0.32 takes `producer` for a mapping; in our early checkpoints it is a text."""

    @wraps(original)
    def normalize(self: Any, config: Any) -> Any:
        settings = getattr(config, "quantization_config", None)
        if isinstance(settings, dict) and isinstance(settings.get("producer"), str):
            settings["producer"] = {"name": settings["producer"]}
        return original(self, config)

    setattr(normalize, _REGISTERED, True)
    return normalize
