"""Teaches transformers to load, run and save quantised checkpoints: a quantizer and its config.

Works with transformers 5.16 and later. The tensors on disk carry the names of `PackedExperts`'
parameters, so no weight conversion takes part in loading.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from erniequant.checkpoint.config import read_config
from erniequant.checkpoint.reader import (
    CONFIG_FILE,
    Checkpoint,
    TensorHeader,
    read_header,
)
from erniequant.errors import ErnieQuantError
from erniequant.packing.layer_keys import experts_module, is_dense_key, layer_key_of
from erniequant.packing.schema import (
    PROJECTIONS,
    QUANT_METHOD,
    LayerSpec,
    QuantizationMetadata,
    guard_tensor,
)
from erniequant.runtime.experts import PackedExperts
from erniequant.runtime.mlp import PackedMlp


class ErnieQuantConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers holds it: the dictionary, parsed strictly."""

    def __init__(self, **settings: Any):
        self.quant_method = QUANT_METHOD
        self.metadata = QuantizationMetadata.from_dict({"quant_method": QUANT_METHOD, **settings})

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that goes back into config.json."""
        return self.metadata.to_dict()


class ErnieQuantizer(HfQuantizer):
    """Replaces the quantised modules before weights are loaded, and checks them after.

    These are the experts of a layer or, in a dense model, its MLP.
    """

    requires_calibration = True
    quantization_config: ErnieQuantConfig

    def __init__(self, quantization_config: ErnieQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._stock: dict[str, nn.Module] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._all_replaced = True
        self._dense = any(map(is_dense_key, quantization_config.metadata.layers))

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        from erniequant.models.registry import stock_modules

        layers, dense_of = dict(self.quantization_config.metadata.layers), stock_modules()
        for path, module in list(model.named_modules()):
            dense = dense_of.get(type(module).__name__)
            if dense is None:
                continue
            key = layer_key_of(path, dense)
            spec = layers.pop(key, None) if key is not None else None
            if key is None or spec is None:
                self._all_replaced = False
                continue
            self._stock[path] = module
            packed = _packed(module, key, spec, model.config)
            model.set_submodule(path, packed)
            # It is in the files for those who do not know the format, and in no module.
            guard = re.escape(f"{experts_module(key)}.{packed.guard}") + "$"
            model._keys_to_ignore_on_load_unexpected.add(guard)
        if layers:
            missing = ", ".join(map(experts_module, layers))
            raise ErnieQuantError(f"quantization_config names {missing}, which the model lacks")
        if checkpoint_files:
            _require_sound(checkpoint_files)
        self._dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Raise ErnieQuantError naming every packed tensor that was not loaded as stored."""
        bad = []
        for path, module in model.named_modules():
            if not isinstance(module, PackedExperts):
                continue
            module.settle()
            for name, parameter in module.named_parameters():
                if parameter.device.type == "meta":
                    continue  # offloaded to disk
                loaded = getattr(parameter, "_is_hf_initialized", False)
                if not loaded or parameter.dtype != module.stored_dtype(name):
                    bad.append(f"{path}.{name} ({'wrong dtype' if loaded else 'missing'})")
        if bad:
            raise ErnieQuantError(f"the quantised checkpoint is incomplete: {', '.join(bad)}")
        for name, parameter in model.named_parameters():
            # transformers 5.16 leaves tensors of quantised checkpoints in their stored type where
            # their names in memory differ, which is all of the decoder of a model that sees images.
            wanted = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted and parameter.device.type != "meta":
                parameter.data = parameter.data.to(wanted)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Keep our tensors as they are when a partly quantised model is saved.

        The stock mapping merges per-expert tensors on load. If layers that stay stock used it,
        saving applies its inverse to every name that matches, which would cut the guard (and before
        5.23, the packed tensors) into experts. A later entry wins on saving. Without stock layers
        nothing is added and loading is a plain read. No stock mapping concerns dense models.
        """
        if self._all_replaced or self._dense:
            return weight_conversions
        names = [
            f"{experts_module(key)}.{projection}"
            for key in self.quantization_config.metadata.layers
            for projection in PROJECTIONS
        ]
        return [*weight_conversions, *(WeightConverter(name, name, [_Keep()]) for name in names)]

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Replicate packed experts: the stock rules would add up identical outputs of all ranks."""
        for rule in [rule for rule in plan if _shards_packed(rule, self._dense)]:
            del plan[rule]

    def update_tp_plan(self, config: Any) -> Any:
        """Called by older versions of transformers instead of `update_parallel_plan`."""
        return _without_packed_rules(config, "base_model_tp_plan", self._dense)

    def update_ep_plan(self, config: Any) -> Any:
        """Like `update_tp_plan`, for expert parallelism."""
        return _without_packed_rules(config, "base_model_ep_plan", self._dense)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for path, stock in self._stock.items():
            packed = model.get_submodule(path)
            assert isinstance(packed, PackedExperts)
            for name, weight in _decoded(packed, wanted or torch.float32).items():
                parent, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(weight, requires_grad=False)
                setattr(stock.get_submodule(parent), leaf, parameter)
            model.set_submodule(path, stock)
        return model

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """The tensors that `save_pretrained` writes: those of the model, and the guards."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # of a model with adapters, only these are saved
        tensors = model.state_dict()
        for path, module in model.named_modules():
            if isinstance(module, PackedExperts):
                tensors[f"{path}.{module.guard}"] = guard_tensor()
        return tensors, {}

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the same tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: gradients pass through packed experts, which have none."""
        return True


class _Keep(ConversionOps):
    """Leaves a tensor as it is, under the name it has."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        return {target_patterns[0]: next(iter(input_dict.values()))}

    @property
    def reverse_op(self) -> "ConversionOps":
        return _Keep()


def _require_sound(files: Sequence[str]) -> None:
    """Check the files of a checkpoint as `erniequant.load` does.

    transformers alone fills what is missing with random numbers, and only warns.
    """
    from erniequant.models.config_check import require_fit
    from erniequant.models.header_check import require_sound

    folder = Path(files[0]).parent
    if not (folder / CONFIG_FILE).is_file():
        return  # a config from elsewhere, which may ask for less than the files hold
    headers: dict[str, TensorHeader] = {}
    for file in files:
        headers |= read_header(Path(file))
    checkpoint = Checkpoint(folder, read_config(folder), headers)
    check = require_sound(checkpoint)
    require_fit(checkpoint.config, headers, {layer.key for layer in check.layers})


def _packed(stock: Any, key: str, spec: LayerSpec, config: Any) -> PackedExperts:
    """The replacement for a stock module of a quantised layer."""
    activation = config.get_text_config().hidden_act
    if is_dense_key(key):
        from erniequant.models.header_check import expert_sizes

        _, hidden, inner = expert_sizes(config.to_dict(), key)
        return PackedMlp(hidden, inner, spec, activation, key)
    return PackedExperts(
        stock.num_experts, stock.hidden_dim, stock.intermediate_dim, spec, activation,
        f"layer {key}",
    )  # fmt: skip


def _decoded(packed: PackedExperts, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Decoded weights under the names that they have in the stock module."""
    if isinstance(packed, PackedMlp):
        gate, up = packed.weight("gate_up_proj", 0, dtype).chunk(2)
        down = packed.weight("down_proj", 0, dtype)
        names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
        return dict(zip(names, (gate, up, down), strict=True))
    experts = range(packed.num_experts)
    return {
        projection: torch.stack([packed.weight(projection, e, dtype) for e in experts])
        for projection in PROJECTIONS
    }


def _shards_packed(rule: str, dense: bool) -> bool:
    if dense:
        return ".mlp." in rule
    return ".experts" in rule and "shared_experts" not in rule


def _without_packed_rules(config: Any, attribute: str, dense: bool) -> Any:
    text = config.get_text_config()
    plan = getattr(text, attribute, None)
    if plan is not None:
        # A copy on the instance: the plan belongs to the class, and so to every other model.
        kept = {rule: how for rule, how in plan.items() if not _shards_packed(rule, dense)}
        setattr(text, attribute, kept)
    return config


def register() -> None:
    """Make the format known to transformers; calling it again does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, ErnieQuantConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, ErnieQuantizer)
