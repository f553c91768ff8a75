"""FastDeploy's WINT2 checkpoints in vLLM: recognised by config.json, and checked before any weight
is read."""

from functools import wraps
from typing import Any

import regex as re
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.config import RECORD, FastDeploySettings, read_settings
from erniequant.formats.fastdeploy.reader import FastDeployCheckpoint, open_fastdeploy
from erniequant.formats.fastdeploy.recognise import is_fastdeploy_wint2
from erniequant.serving.vllm.experts import plain_experts
from erniequant.serving.vllm.quantization_config import PackedConfig
from erniequant.serving.vllm.wint2_experts import Wint2ExpertsMethod

METHOD = "erniequant-fastdeploy"
"""vLLM's name of the format; FastDeploy's config.json has none."""
ARCHITECTURE = "ErnieQuantFastDeployForCausalLM"
_REGISTERED = "_erniequant"


class FastDeployVllmConfig(PackedConfig):
    """`quantization_config` of FastDeploy as vLLM holds it. vLLM pickles it for its workers.

    Attributes:
        settings: the coding of the experts.
        k_order: K order of WINT2, once the checkpoint was looked at.
    """

    def __init__(self, settings: FastDeploySettings):
        super().__init__()
        self.settings = settings
        self.k_order: str | None = None

    def get_name(self) -> str:
        """See `METHOD`."""
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FastDeployVllmConfig":
        """Raises ErnieQuantError for another type of weights than can be read."""
        return cls(read_settings({"quantization_config": config}))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called before the model is built: find the K order.

        Raises:
            ErnieQuantError: a tensor is missing, left over, or of another shape or dtype, or nobody
                says in which order WINT2 has its inputs.
        """
        given = getattr(hf_config, RECORD, None)
        self.k_order = open_known(model_name, given if isinstance(given, dict) else {}).k_order

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What loads and multiplies the weights of a module; None leaves it to vLLM."""
        if isinstance(layer, RoutedExperts):
            index = re.search(r"\blayers\.(\d+)\.", prefix)
            if index is None or int(index[1]) <= self.settings.w4_end_layer:
                return plain_experts(layer, f"{prefix}, wint4,")
            where = f"layer {index[1]}"
            return Wint2ExpertsMethod(layer.moe_config, self.k_order or "plain", where)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def open_known(source: str, record: dict[str, Any]) -> FastDeployCheckpoint:
    """A checkpoint whose K order is known: from its files, or from ``record``, which may come from
    vLLM's hf_overrides.

    Raises:
        ErnieQuantError: it is not, or the checkpoint is damaged.
    """
    opened = open_fastdeploy(source, record.get("k_order"))
    require_no_adapter(opened.folder)
    if opened.k_order is None:
        raise ErnieQuantError(
            f"{opened.folder} does not say in which order its WINT2 codes have their inputs; give "
            f'--hf-overrides \'{{"{RECORD}": {{"k_order": "mma64"}}}}\' (mma64 since July 2025, '
            "plain before)"
        )
    return opened


def register() -> None:
    """Have vLLM recognise such checkpoints; calling it again does nothing."""
    convertor = ModelArchConfigConvertorBase
    if hasattr(convertor.convert, _REGISTERED):
        return
    register_quantization_config(METHOD)(FastDeployVllmConfig)
    convertor.convert = _naming_the_method(convertor.convert)


def _naming_the_method(original: Any) -> Any:
    """vLLM chooses by `quant_method` and `architectures`, of which FastDeploy writes none, and that
    of plain weights."""

    @wraps(original)
    def convert(self: Any, *args: Any, **kw: Any) -> Any:
        config = self.hf_config
        settings: Any = getattr(config, "quantization_config", None)
        if is_fastdeploy_wint2({"quantization_config": settings}):
            settings.setdefault("quant_method", METHOD)
            config.architectures = [ARCHITECTURE]
        return original(self, *args, **kw)

    setattr(convert, _REGISTERED, True)
    return convert
