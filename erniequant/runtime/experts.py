"""The experts of one layer, kept packed: a drop-in for the experts modules of transformers.

They run on packed weights (`erniequant.runtime.ops`). For what the kernels do not take, an expert's
two matrices are decoded to the activation dtype as they are needed. Decoded weights equal those of
an export: the same logits up to the order of summation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from erniequant.packing.layer_keys import GUARD
from erniequant.packing.products import DIFFERENTIABLE
from erniequant.packing.schema import SUFFIXES, LayerSpec, layer_params
from erniequant.runtime.decoding import decode_fast
from erniequant.runtime.decoding_module import DecodingExperts, batch_without_memory
from erniequant.runtime.ops import moe_experts, run_kernels, spec_text, takes

_NAMES = {
    projection: tuple(f"{projection}_{suffix}" for suffix in SUFFIXES)
    for projection in ("gate_up_proj", "down_proj")
}


class PackedExperts(DecodingExperts):
    """All experts of a layer; parameters as stored, directly on the module.

    The guard (see docs/format.md) is none of them: adapters would take it for the experts' weight,
    and a cast would change it. `guard` is its name, and whoever saves the model writes it.
    """

    def __init__(
        self, experts: int, hidden: int, inner: int, spec: LayerSpec, activation: str, where: str,
        *, guard: str = GUARD,
    ):  # fmt: skip
        """Parameters are left uninitialised. Raises ErnieQuantError if ``spec`` does not fit."""
        super().__init__(experts, activation)
        self.hidden_dim, self.intermediate_dim = hidden, inner
        self.spec, self.guard = spec, guard
        self._spec_text = spec_text(spec)
        self._stored = layer_params(experts, hidden, inner, spec, where, guard=guard)
        del self._stored[guard]
        for name, (shape, dtype) in self._stored.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            self.register_parameter(name, parameter)

    @property
    def weights(self) -> int:
        """Number of weights that are packed."""
        return 3 * self.num_experts * self.hidden_dim * self.intermediate_dim

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that the format gives a parameter."""
        return self._stored[name][1]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        moved = super()._apply(fn, recurse)
        self.settle()
        return moved

    def settle(self) -> None:
        """Have what the kernels need beside the parameters where these are. Whoever sets
        parameters on a GPU without moving the module calls it."""
        device = next(self.parameters()).device
        if self.launches_kernels(device, torch.bfloat16):
            from erniequant_kernels.moe import constants_on

            constants_on(device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Files hold the guard, which has no place here.
        state_dict.pop(prefix + self.guard, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def multiplies_packed(self, device: torch.device, dtype: torch.dtype) -> bool:
        """As the operator does."""
        return takes(device, dtype, self.activation)

    def decode(self, projection: str, expert: int) -> torch.Tensor:
        """Weights float32 ``[N, K]`` of one expert."""
        return decode_fast(
            getattr(self, f"{projection}_packed")[expert],
            getattr(self, f"{projection}_scale")[expert],
            getattr(self, f"{projection}_signs")[0, 0],
            self.spec.projection(projection),
        )

    def multiply(
        self, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor
    ) -> torch.Tensor:
        """The operator, except where weights are kept, which it cannot use, or where it has no
        gradient."""
        decoded = self._keep_decoded and not torch.compiler.is_compiling()
        trained = torch.is_grad_enabled() and (x.requires_grad or routing.requires_grad)
        if decoded or (trained and self.activation not in DIFFERENTIABLE):
            return self.multiply_decoded(x, expert_index, routing)
        return moe_experts(
            x, expert_index, routing, *self._tensors("gate_up_proj"),
            *self._tensors("down_proj"), self._spec_text, self.activation,
        )  # fmt: skip

    def rehearse(self, tokens: int, top_k: int, dtype: torch.dtype) -> None:
        """See `DecodingExperts.rehearse`."""
        batch = batch_without_memory(tokens, self.hidden_dim, top_k, dtype)
        gate_up, down = (
            tuple(tensor.to("meta") for tensor in self._tensors(projection))
            for projection in ("gate_up_proj", "down_proj")
        )
        card = next(self.parameters()).device
        run_kernels(*batch, gate_up, down, self.spec, card)

    def _tensors(self, projection: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Six look-ups through nn.Module take the host as long as two launches.
        stored: dict[str, Any] = self._parameters
        packed, scale, signs = (stored[name] for name in _NAMES[projection])
        return packed, scale, signs

    def extra_repr(self) -> str:
        """Sizes and codes, for printing a model."""
        return (
            f"experts={self.num_experts}, hidden={self.hidden_dim}, inner={self.intermediate_dim}, "
            f"{self.spec}"
        )
