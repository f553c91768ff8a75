"""Routed experts in vLLM, kept packed: the same operator as in transformers."""

from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform

from erniequant.errors import ErnieQuantError
from erniequant.packing.layer_keys import GUARD
from erniequant.packing.schema import LayerSpec
from erniequant.packing.sharding import Share, share_params
from erniequant.runtime.ops import moe_experts, spec_text
from erniequant.serving.vllm.loading import PackedTensors


class UnpaddedExpertsMethod(FusedMoEMethodBase):
    """What experts that stay packed have in common, whatever their format."""

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        """As they are: packed matrices cannot be padded."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: it describes the kernels of vLLM."""
        return None


class PackedExpertsMethod(UnpaddedExpertsMethod):
    """Weights and product of one layer's experts. Router, shared experts and the sum over ranks
    are vLLM's."""

    def __init__(self, moe: Any, spec: LayerSpec, where: str):
        super().__init__(moe)
        self._spec, self._where, self._spec_text = spec, where, spec_text(spec)

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int,
        intermediate_size_per_partition: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Register the rank's share under the names of the format.

        Raises:
            ErnieQuantError: the layer cannot be divided among so many ranks.
        """
        share = share_of(layer, self.moe)
        inner = intermediate_size_per_partition * share.ranks
        infos = share_params(
            self.moe.num_experts, hidden_size, inner, self._spec, share, self._where
        )
        self._tensors = PackedTensors(layer, infos, share, self._where)
        # vLLM's loader would look for one matrix of each expert.
        layer.load_weights = partial(self._tensors.load_all, ignored=GUARD)
        if layer.e_score_correction_bias is not None:
            # vLLM leaves it uninitialised, and checkpoints without correction do not store it.
            layer.e_score_correction_bias.data.zero_()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise ErnieQuantError if a tensor is missing; vLLM does not look."""
        self._tensors.require_complete()
        prepare_for_graphs(layer.gate_up_proj_packed.device)

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
        *_: Any, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        """The rank's part of the weighted sum over the chosen experts, ``[T, H]``."""
        return moe_experts(
            x, local_experts(layer.expert_map, topk_ids), topk_weights,
            layer.gate_up_proj_packed, layer.gate_up_proj_scale, layer.gate_up_proj_signs,
            layer.down_proj_packed, layer.down_proj_scale, layer.down_proj_signs,
            self._spec_text, layer.activation.value,
        )  # fmt: skip


def plain_experts(layer: Any, where: str) -> UnquantizedFusedMoEMethod:
    """vLLM's own weights and product, for experts that are not packed.

    Raises:
        ErnieQuantError: on a CPU, ranks are to divide them: vLLM 0.32 reads beyond the experts of a
            rank there, and the process dies.
    """
    if current_platform.is_cpu() and layer.moe_config.moe_parallel_config.use_ep:
        raise ErnieQuantError(
            f"{where} has experts that are not packed, which vLLM cannot divide among ranks on a "
            "CPU; serve without expert parallelism"
        )
    return UnquantizedFusedMoEMethod(layer.moe_config)


def share_of(layer: Any, moe: Any) -> Share:
    """The part of the experts that this process holds."""
    if layer.expert_map is None:
        return Share(moe.tp_rank, moe.tp_size)
    local = {layer._map_global_expert_id_to_local_expert_id(e): e for e in range(moe.num_experts)}
    local.pop(-1, None)
    return Share(moe.tp_rank, moe.tp_size, tuple(local[index] for index in sorted(local)))


def local_experts(expert_map: torch.Tensor | None, topk_ids: torch.Tensor) -> torch.Tensor:
    """Indices of experts within this process; -1, which the operators ignore, for others."""
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)])


def prepare_for_graphs(device: torch.device) -> None:
    """Have on a GPU what kernels need beside weights, before vLLM captures graphs."""
    if device.type == "cuda":
        from erniequant_kernels.moe import constants_on

        constants_on(device)
