"""Routed experts in WINT2 in vLLM, kept packed: the same operator as in transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config

from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.convert import encoded_to_rank
from erniequant.formats.fastdeploy.names import PROJECTIONS, WINT2_SUFFIXES, Matrix
from erniequant.formats.fastdeploy.sizes import WINT2_INPUTS
from erniequant.runtime.wint2_ops import moe_experts_wint2
from erniequant.serving.vllm.experts import UnpaddedExpertsMethod, local_experts, share_of


class Wint2ExpertsMethod(UnpaddedExpertsMethod):
    """Weights and product of one layer's experts. Parameters ``{projection}_{suffix}``
    ``[E, ...]`` stack what a checkpoint stores for each expert of the rank."""

    def __init__(self, moe: Any, k_order: str, where: str):
        super().__init__(moe)
        self._k_order, self._where = k_order, where

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int,
        intermediate_size_per_partition: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Register the rank's share.

        Raises:
            ErnieQuantError: the layer cannot be divided among so many ranks.
        """
        self.share = share_of(layer, self.moe)
        inner = intermediate_size_per_partition * self.share.ranks
        require_divisible(inner, self.share.ranks, self._where)
        # By the local number of an expert; experts of other ranks are absent.
        experts = self.share.experts or range(num_experts)
        self._local = {number: local for local, number in enumerate(experts)}
        self._missing = {(number, projection) for number in experts for projection in PROJECTIONS}
        for projection in PROJECTIONS:
            part = matrix_of(projection, hidden_size, inner)
            for suffix, (shape, dtype) in part.keys(self.share.ranks).items():
                zeros = torch.zeros((len(experts), *shape), dtype=dtype)
                layer.register_parameter(
                    f"{projection}_{suffix}", nn.Parameter(zeros, requires_grad=False)
                )

    def holds(self, part: Matrix) -> bool:
        """True if the rank has a share of an expert's matrix."""
        return part.expert is not None and part.expert[1] in self._local

    def load_matrix(
        self, layer: Any, part: Matrix, stored: Mapping[str, torch.Tensor], whole: bool
    ) -> list[str]:
        """Copy the rank's share of one matrix, and name the parameters that have it.

        stored: by suffix; of the whole matrix, or of this rank's own folder.
        """
        assert part.expert is not None
        _, expert, projection = part.expert
        share = self.share
        cut = encoded_to_rank(part, stored, share.rank, share.ranks) if whole else stored
        names = [f"{projection}_{suffix}" for suffix in WINT2_SUFFIXES]
        for name, suffix in zip(names, WINT2_SUFFIXES, strict=True):
            layer.get_parameter(name).data[self._local[expert]].copy_(cut[suffix])
        self._missing.discard((expert, projection))
        return names

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise ErnieQuantError if a matrix is missing; vLLM does not look."""
        if self._missing and get_current_vllm_config().load_config.load_format != "dummy":
            expert, projection = min(self._missing)
            raise ErnieQuantError(f"{self._where}: {projection} of expert {expert} is missing")
        if layer.down_proj_quant_weight.is_cuda:
            from erniequant_kernels.matrices import Wint2Matrices
            from erniequant_kernels.wint2_moe import prepare_constants

            # Before vLLM captures graphs.
            both = (
                dict(zip(WINT2_SUFFIXES, _stored(layer, projection), strict=True))
                for projection in PROJECTIONS
            )
            prepare_constants(*(Wint2Matrices.of(parts, self._k_order) for parts in both))

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
        *_: Any, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        """The rank's part of the weighted sum over the chosen experts, ``[T, H]``."""
        gate_up, down = (_stored(layer, projection) for projection in PROJECTIONS)
        index = local_experts(layer.expert_map, topk_ids)
        return moe_experts_wint2(x, index, topk_weights, gate_up, down, self._k_order)


def matrix_of(projection: str, hidden: int, inner: int) -> Matrix:
    """One matrix of an expert, without the names that it has in a checkpoint."""
    if projection == "up_gate_proj":
        return Matrix(projection, "wint2", ("gate", "up"), (inner, inner), hidden, "outputs")
    return Matrix(projection, "wint2", ("down",), (hidden,), inner, "inputs")


def require_divisible(inner: int, ranks: int, where: str) -> None:
    """Refuse a number of ranks of tensor parallelism that would cut a byte of scales.

    Raises:
        ErnieQuantError: names ``where``, the sizes, and the ways out.
    """
    if inner % (WINT2_INPUTS * ranks):
        raise ErnieQuantError(
            f"{where}: WINT2 has a byte of scales for {WINT2_INPUTS} inputs of down_proj, so "
            f"{inner} cannot be divided among {ranks} ranks; use fewer ranks, or divide whole "
            "experts (expert parallelism)"
        )


def _stored(layer: Any, projection: str) -> list[torch.Tensor]:
    return [getattr(layer, f"{projection}_{suffix}") for suffix in WINT2_SUFFIXES]
