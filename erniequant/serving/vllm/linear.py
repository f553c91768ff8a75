"""The MLP of a dense model in vLLM: two linear layers, packed, called one by one."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from erniequant.packing.schema import LayerSpec
from erniequant.packing.sharding import Share, share_params
from erniequant.runtime.packed_linear import matrix_text, packed_linear
from erniequant.serving.vllm.experts import prepare_for_graphs
from erniequant.serving.vllm.loading import PackedTensors


class PackedLinearMethod(LinearMethodBase):
    """Weights and product of ``gate_up_proj`` or ``down_proj``."""

    def __init__(self, projection: str, layer: LayerSpec, where: str):
        self._projection, self._layer, self._where = projection, layer, where
        self._spec_text = matrix_text(layer.projection(projection))

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Register the rank's share as ``packed``, ``scale`` and ``signs``.

        Raises:
            ErnieQuantError: the MLP cannot be divided among so many ranks.
        """
        first = self._projection == "gate_up_proj"
        hidden, inner = (input_size, output_size // 2) if first else (output_size, input_size)
        share = Share(layer.tp_rank, layer.tp_size)
        prefix = f"{self._projection}_"
        params = share_params(1, hidden, inner, self._layer, share, self._where)
        infos = {n.removeprefix(prefix): i for n, i in params.items() if n.startswith(prefix)}
        self._tensors = PackedTensors(layer, infos, share, self._where, prefix)
        for name, parameter in layer.named_parameters(recurse=False):
            if name in infos:
                set_weight_attrs(parameter, {"weight_loader": self._loader(name)})

    def _loader(self, name: str) -> Any:
        def load(parameter: Any, stored: torch.Tensor, shard_id: Any = None) -> None:
            # Merged layers pass a shard, which is None, as both halves are one tensor.
            self._tensors.load(name, stored)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise ErnieQuantError if a tensor is missing; vLLM does not look."""
        self._tensors.require_complete()
        prepare_for_graphs(layer.packed.device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``[..., N]`` of the rank, in the dtype of ``x``."""
        out = packed_linear(x, layer.packed, layer.scale, layer.signs, self._spec_text)
        return out if bias is None else out + bias
