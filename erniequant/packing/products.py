"""The experts of a layer in plain torch, and their gradient: one expert at a time, decoded when its
turn comes.

The backward pass decodes again instead of keeping weights: training an adapter on a packed model
takes the memory of the packed weights, not of the original's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

WeightOf = Callable[[str, int], torch.Tensor]
"""Projection and expert to the decoded weights ``[N, K]`` in the dtype of the activations."""

DIFFERENTIABLE = ("silu",)
"""Activations whose derivative is written out in `experts_backward`."""


def experts_forward(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, experts: int,
    weight: WeightOf, activation: str,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of the chosen experts' outputs; accumulates in float32.

    Args:
        x: ``[T, H]`` of any float type; T may be 0.
        expert_index: integer ``[T, k]``; an index outside ``[0, experts)`` contributes nothing.
        routing: float ``[T, k]``.

    Returns:
        ``[T, H]`` in the dtype of ``x``, contiguous.

    Waits for the device: it asks which experts were chosen.
    """
    act = ACT2FN[activation]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in _chosen(expert_index, experts):
        token, slot = torch.where(expert_index == expert)
        gate_up = functional.linear(x[token], weight("gate_up_proj", expert))
        gate, up = gate_up.chunk(2, dim=-1)
        y = functional.linear(act(gate) * up, weight("down_proj", expert))
        out.index_add_(0, token, y.float() * routing[token, slot, None].float())
    return out.to(x.dtype)


def experts_backward(
    grad: torch.Tensor, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    experts: int, weight: WeightOf,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `experts_forward` with the activation "silu" for ``x`` and for ``routing``.

    grad: ``[T, H]``, of the output. Both results have the shape and dtype of what they belong to
    and are contiguous; sums run in float32.
    """
    grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    grad_routing = torch.zeros(routing.shape, dtype=torch.float32, device=x.device)
    for expert in _chosen(expert_index, experts):
        token, slot = torch.where(expert_index == expert)
        gate_up_weight = weight("gate_up_proj", expert)
        gate, up = functional.linear(x[token], gate_up_weight).chunk(2, dim=-1)
        silu = functional.silu(gate)
        # The output is linear in the routing weight: its gradient needs no product of its own.
        grad_inner = grad[token] @ weight("down_proj", expert)
        grad_routing[token, slot] = (grad_inner.float() * (silu * up).float()).sum(-1)
        grad_inner = grad_inner * routing[token, slot, None].to(grad_inner.dtype)
        grad_gate = torch.ops.aten.silu_backward(grad_inner * up, gate)
        grad_gate_up = torch.cat([grad_gate, grad_inner * silu], dim=-1)
        grad_x.index_add_(0, token, (grad_gate_up @ gate_up_weight).float())
    return grad_x.to(x.dtype), grad_routing.to(routing.dtype)


class DecodedProduct(torch.autograd.Function):
    """`experts_forward` whose backward pass asks for the weights once more."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, routing: torch.Tensor, expert_index: torch.Tensor, experts: int,
        weight: WeightOf,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, routing, expert_index)
        ctx.experts, ctx.weight = experts, weight
        return experts_forward(x, expert_index, routing, experts, weight, "silu")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, routing, expert_index = ctx.saved_tensors
        grads = experts_backward(grad, x, expert_index, routing, ctx.experts, ctx.weight)
        return (*grads, None, None, None)


def _chosen(expert_index: torch.Tensor, experts: int) -> list[int]:
    """Experts that any token goes to, ascending."""
    return [e for e in torch.unique(expert_index).tolist() if 0 <= e < experts]
