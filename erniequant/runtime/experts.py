"""The experts of one layer, kept packed: a drop-in for the experts modules of transformers.

On a GPU they run on packed weights (`erniequant.runtime.ops`). Elsewhere, and for what the kernels
do not take, an expert's two matrices are decoded to the activation dtype as they are needed.
Decoded weights equal those of an export: the same logits up to the order of summation.
"""

import torch
from torch import nn

from erniequant.format.decoding import decode_weight
from erniequant.format.schema import GUARD, SUFFIXES, LayerSpec, layer_params
from erniequant.runtime.decoded import DecodingExperts
from erniequant.runtime.ops import experts_forward, moe_experts, spec_text


class PackedExperts(DecodingExperts):
    """All experts of a layer; parameters as stored, directly on the module.

    The guard is a parameter too (see docs/format.md), so that saving the model writes it again.
    """

    def __init__(
        self, experts: int, hidden: int, inner: int, spec: LayerSpec, activation: str, where: str,
        *, guard: str = GUARD,
    ):  # fmt: skip
        """Parameters are left uninitialised. Raises ErnieQuantError if ``spec`` does not fit."""
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, inner
        self.spec = spec
        self.activation = activation
        self._spec_text = spec_text(spec)
        self._stored = layer_params(experts, hidden, inner, spec, where, guard=guard)
        for name, (shape, dtype) in self._stored.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            child, _, leaf = name.rpartition(".")
            if child:
                # A parameter's own name has no dot; only the guard of a dense layer has one.
                self.add_module(child, nn.Module())
            self.get_submodule(child).register_parameter(leaf, parameter)

    @property
    def weights(self) -> int:
        """Number of weights that are packed."""
        return 3 * self.num_experts * self.hidden_dim * self.intermediate_dim

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that the format gives a parameter, the guard included."""
        return self._stored[name][1]

    def decode(self, projection: str, expert: int) -> torch.Tensor:
        """Weights float32 ``[N, K]`` of one expert."""
        return decode_weight(
            getattr(self, f"{projection}_packed")[expert],
            getattr(self, f"{projection}_scale")[expert],
            getattr(self, f"{projection}_signs")[0, 0],
            self.spec.projection(projection),
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        hidden_states ``[T, H]``, top_k_index int64 ``[T, k]``, top_k_weights ``[T, k]``; returns
        ``[T, H]`` in the dtype of hidden_states. T may be 0; indices beyond the experts do nothing.
        """
        # The operator has no gradient; decoded weights are kept for speed, which it cannot use.
        needs_gradient = torch.is_grad_enabled() and hidden_states.requires_grad
        if needs_gradient or (self._keep_decoded and not torch.compiler.is_compiling()):
            return experts_forward(
                hidden_states, top_k_index, top_k_weights, self.num_experts,
                lambda projection, e: self.weight(projection, e, hidden_states.dtype),
                self.activation,
            )  # fmt: skip
        return moe_experts(
            hidden_states, top_k_index, top_k_weights, *self._tensors("gate_up_proj"),
            *self._tensors("down_proj"), self._spec_text, self.activation,
        )  # fmt: skip

    def _tensors(self, projection: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        packed, scale, signs = (getattr(self, f"{projection}_{suffix}") for suffix in SUFFIXES)
        return packed, scale, signs[0, 0]

    def extra_repr(self) -> str:
        """Sizes and codes, for printing a model."""
        return (
            f"experts={self.num_experts}, hidden={self.hidden_dim}, inner={self.intermediate_dim}, "
            f"{self.spec}"
        )
