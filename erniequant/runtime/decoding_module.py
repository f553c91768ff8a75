"""Experts modules that decode weights as they are needed, and may keep them."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from erniequant.packing.products import DIFFERENTIABLE, DecodedProduct, experts_forward


class DecodingExperts(nn.Module):
    """The common base of every format's experts modules.

    Attributes:
        keep_decoded: keep every expert's weights after first use, at the memory of the original
            model. Faster only where `multiplies_packed` says no; set it back to False to free them.
        num_experts: experts of the layer.
        hidden_dim: channels of a token, where `launches_kernels`.
        activation: name of the activation of the gate, as in the model's config.
    """

    hidden_dim: int

    def __init__(self, experts: int, activation: str) -> None:
        super().__init__()
        self.num_experts, self.activation = experts, activation
        self._keep_decoded = False
        self._decoded: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    @property
    @abstractmethod
    def weights(self) -> int:
        """Number of weights that are packed."""

    @abstractmethod
    def multiplies_packed(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether activations of a dtype are multiplied with packed weights there, without decoding
        them first."""

    def launches_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether activations of a dtype are multiplied by Triton's kernels there."""
        return device.type == "cuda" and self.multiplies_packed(device, dtype)

    def rehearse(self, tokens: int, top_k: int, dtype: torch.dtype) -> None:
        """Make the launches of a batch with inputs and weights that have no memory (``meta``): for
        `erniequant_kernels.launch.compile_all`, where `launches_kernels`."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, projection: str, expert: int) -> torch.Tensor:
        """Weights float32 ``[N, K]`` of one expert."""

    @abstractmethod
    def multiply(
        self, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor
    ) -> torch.Tensor:
        """`forward` in the dtype of ``x``."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        hidden_states ``[T, H]``, top_k_index int64 ``[T, k]``, top_k_weights ``[T, k]``; returns
        ``[T, H]`` in the dtype of hidden_states. T may be 0; indices beyond the experts do nothing.
        Under autocast the products run in its dtype, as those of the stock module do. Gradients
        reach hidden_states and top_k_weights; the experts themselves have none.
        """
        x, device = hidden_states, hidden_states.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return self.multiply(x, top_k_index, top_k_weights).to(hidden_states.dtype)

    @property
    def keep_decoded(self) -> bool:
        """True if decoded weights are kept."""
        return self._keep_decoded

    @keep_decoded.setter
    def keep_decoded(self, keep: bool) -> None:
        self._keep_decoded = keep
        self._decoded.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # Moving the module to another device must not leave weights behind.
        self._decoded.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._decoded.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def weight(self, projection: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Weights ``[N, K]`` of one expert, decoded in float32 and rounded to ``dtype``."""
        key = (projection, expert, dtype)
        decoded = self._decoded.get(key)
        if decoded is None:
            # Kept weights serve training too, whatever mode the first caller was in.
            with torch.inference_mode(False), torch.no_grad():
                decoded = self.decode(projection, expert).to(dtype)
            if self._keep_decoded:
                self._decoded[key] = decoded
        return decoded

    # Decoding goes through numpy, and which experts are chosen is known only when it runs.
    @torch.compiler.disable
    def multiply_decoded(
        self, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor
    ) -> torch.Tensor:
        """`multiply` with weights from `weight`, in plain torch."""

        def weight(projection: str, expert: int) -> torch.Tensor:
            return self.weight(projection, expert, x.dtype)

        if self.activation in DIFFERENTIABLE:
            out: torch.Tensor = DecodedProduct.apply(
                x, routing, expert_index, self.num_experts, weight
            )
            return out
        return experts_forward(x, expert_index, routing, self.num_experts, weight, self.activation)


def batch_without_memory(
    tokens: int, hidden: int, top_k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, indices and weights as a model's router gives them, on ``meta``."""

    def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tokens, size, dtype=dtype, device="meta")

    return empty(hidden, dtype), empty(top_k, torch.int64), empty(top_k, dtype)
