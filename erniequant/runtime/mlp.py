"""The MLP of a dense layer, kept packed: one expert that every token is routed to with weight 1.

It runs through the same operator as the experts of a mixture, and so on the same kernels.
"""

import torch

from erniequant.packing.layer_keys import guard_name
from erniequant.packing.schema import LayerSpec
from erniequant.runtime.experts import PackedExperts


class PackedMlp(PackedExperts):
    """A drop-in for the MLP of a dense model; parameters as stored, the guard in a child."""

    def __init__(self, hidden: int, inner: int, spec: LayerSpec, activation: str, key: str):
        """Parameters are left uninitialised. Raises ErnieQuantError if ``spec`` does not fit.

        key: the layer's key in the description, such as ``3.mlp``.
        """
        super().__init__(1, hidden, inner, spec, activation, f"layer {key}", guard=guard_name(key))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """hidden_states ``[..., H]`` of any float type; returns the same shape and dtype."""
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        only = tokens.new_zeros((len(tokens), 1), dtype=torch.int64)
        out = super().forward(tokens, only, tokens.new_ones((len(tokens), 1)))
        return out.reshape(hidden_states.shape)
