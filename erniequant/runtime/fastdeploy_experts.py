"""The experts of one layer in FastDeploy's formats, kept packed: a drop-in for the experts module
of transformers.

Experts in WINT2 run on packed weights (`erniequant.runtime.wint2_ops`). In wint4 or float32 an
expert's two matrices are decoded in plain torch as they are needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from erniequant.runtime.decoding_module import DecodingExperts, batch_without_memory
from erniequant.runtime.ops import takes
from erniequant.runtime.wint2_ops import (
    PARTS,
    moe_experts_wint2,
    run_wint2_kernels,
    wint2_matrices,
)

Decoder = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Stored parts of one matrix by suffix to its weights, float32 ``[N, K]``."""

_NAMES = {"gate_up_proj": "up_gate_proj", "down_proj": "down_proj"}


class FastDeployExperts(DecodingExperts):
    """All experts of a layer; parameters ``{up_gate_proj,down_proj}_{suffix}`` ``[E, ...]`` stack
    what a checkpoint stores for each.
    """

    def __init__(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        decode: Mapping[str, Decoder],
        activation: str,
        weights: int,
        k_order: str | None = None,
    ):
        """``parts`` and ``decode`` by ``up_gate_proj`` and ``down_proj``; ``weights`` counts those
        that they stand for; ``k_order`` if both are in WINT2."""
        super().__init__(len(next(iter(parts["down_proj"].values()))), activation)
        self._weights, self.k_order = weights, k_order
        self._suffixes = {name: tuple(tensors) for name, tensors in parts.items()}
        self._decode = decode
        for name, tensors in parts.items():
            for suffix, tensor in tensors.items():
                parameter = nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(f"{name}_{suffix}", parameter)
        if k_order is not None:
            self.hidden_dim = 4 * parts["up_gate_proj"]["quant_weight"].shape[1]
        self.settle()

    @property
    def weights(self) -> int:
        """Number of weights that are packed."""
        return self._weights

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        stored = {name: parameter.data for name, parameter in self.named_parameters()}
        moved = super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype != stored[name].dtype:
                # Another type of activations must not round scales and code books.
                parameter.data = stored[name].to(parameter.device)
        self.settle()
        return moved

    def settle(self) -> None:
        """Have what the kernels need beside the parameters where these are."""
        device = next(self.parameters()).device
        if self.launches_kernels(device, torch.bfloat16):
            from erniequant_kernels.wint2_moe import prepare_constants

            order = self.k_order or ""
            prepare_constants(*(wint2_matrices(parts, order) for parts in self._wint2_parts()))

    def multiplies_packed(self, device: torch.device, dtype: torch.dtype) -> bool:
        """WINT2, in what the products of a device take."""
        return self._fits_kernels and takes(device, dtype)

    def decode(self, projection: str, expert: int) -> torch.Tensor:
        """Weights float32 ``[N, K]`` of one expert."""
        name = _NAMES[projection]
        stored = self._parts(name)
        return self._decode[name]({suffix: stored[suffix][expert] for suffix in stored})

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        return {suffix: getattr(self, f"{name}_{suffix}") for suffix in self._suffixes[name]}

    def multiply(
        self, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor
    ) -> torch.Tensor:
        """The operator for WINT2, except where weights are kept, which it cannot use, or where a
        gradient is wanted, which it does not have."""
        decoded = self._keep_decoded and not torch.compiler.is_compiling()
        trained = torch.is_grad_enabled() and (x.requires_grad or routing.requires_grad)
        if decoded or trained or not self._fits_kernels:
            return self.multiply_decoded(x, expert_index, routing)
        return moe_experts_wint2(x, expert_index, routing, *self._wint2_parts(), self.k_order or "")

    @property
    def _fits_kernels(self) -> bool:
        return self.activation == "silu" and self.k_order is not None

    def _wint2_parts(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        gate_up, down = (
            [getattr(self, f"{name}_{part}") for part in PARTS] for name in _NAMES.values()
        )
        return gate_up, down

    def rehearse(self, tokens: int, top_k: int, dtype: torch.dtype) -> None:
        """See `DecodingExperts.rehearse`."""
        gate_up, down = ([part.to("meta") for part in parts] for parts in self._wint2_parts())
        batch = batch_without_memory(tokens, self.hidden_dim, top_k, dtype)
        card = next(self.parameters()).device
        run_wint2_kernels(*batch, gate_up, down, self.k_order or "", card)

    def extra_repr(self) -> str:
        """Sizes, for printing a model."""
        shapes: dict[str, Any] = {n: tuple(p.shape) for n, p in self.named_parameters()}
        return f"experts={self.num_experts}, {shapes}"
