"""The experts of one layer in FastDeploy's formats, kept packed: a drop-in for the experts module
of transformers.

On a GPU, experts in WINT2 run on kernels that decode a few at a time. Elsewhere, and in wint4 or
float32, an expert's two matrices are decoded in plain torch as they are needed.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from erniequant.runtime.decoding_module import DecodingExperts
from erniequant.runtime.ops import KERNEL_DTYPES

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
        return moved

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
        """Runs on kernels where they apply, without gradient; else on decoded weights."""
        trained = torch.is_grad_enabled() and (x.requires_grad or routing.requires_grad)
        if self._on_kernels(x) and not self._keep_decoded and not trained:
            return self._run_kernels(x, expert_index, routing)
        return self.multiply_decoded(x, expert_index, routing)

    def _on_kernels(self, x: torch.Tensor) -> bool:
        fits = x.dtype in KERNEL_DTYPES and self.activation == "silu"
        return x.is_cuda and fits and self.k_order is not None

    def _run_kernels(
        self, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor
    ) -> torch.Tensor:
        from erniequant_kernels.tuning import tuning_for
        from erniequant_kernels.wint2_moe import Wint2Matrices, moe_experts_wint2

        gate_up, down = (
            Wint2Matrices.of(self._parts(name), self.k_order or "") for name in _NAMES.values()
        )
        # Triton launches on the current device, which in a model over several is often another one.
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return moe_experts_wint2(
                x.contiguous(), expert_index, routing, gate_up, down, tuning_for(x.device)
            )

    def extra_repr(self) -> str:
        """Sizes, for printing a model."""
        shapes: dict[str, Any] = {n: tuple(p.shape) for n, p in self.named_parameters()}
        return f"experts={self.num_experts}, {shapes}"
