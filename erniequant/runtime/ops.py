"""The experts of a layer as one operator of torch: kernels on CUDA, plain torch elsewhere.

`erniequant::moe_experts` is opaque to `torch.compile` and can be captured in a CUDA graph. Its
workspace is what `erniequant_kernels.moe.Plan.workspace_bytes` says; weights stay packed, except
where many tokens per expert make it cheaper to decode a few experts at a time into that workspace.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from erniequant.format.decoding import decode_weight
from erniequant.format.schema import LayerSpec, MatrixSpec

WeightOf = Callable[[str, int], torch.Tensor]
"""Projection and expert to the decoded weights ``[N, K]`` in the dtype of the activations."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""Activations that the kernels take; float32 asks for more precision than they have."""


def experts_forward(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, experts: int,
    weight: WeightOf, activation: str,
) -> torch.Tensor:  # fmt: skip
    """The whole computation in plain torch, one expert at a time; accumulates in float32.

    Shapes as in `_in_plain_torch`. Waits for the device: it asks which experts were chosen.
    """
    act = ACT2FN[activation]
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in torch.unique(expert_index).tolist():
        if not 0 <= expert < experts:
            continue
        token, slot = torch.where(expert_index == expert)
        gate_up = functional.linear(x[token], weight("gate_up_proj", expert))
        gate, up = gate_up.chunk(2, dim=-1)
        y = functional.linear(act(gate) * up, weight("down_proj", expert))
        out.index_add_(0, token, y.float() * routing[token, slot, None].float())
    return out.to(x.dtype)


def _in_plain_torch(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    routing: torch.Tensor,
    gate_up_packed: torch.Tensor,
    gate_up_scale: torch.Tensor,
    gate_up_signs: torch.Tensor,
    down_packed: torch.Tensor,
    down_scale: torch.Tensor,
    down_signs: torch.Tensor,
    spec: str,
    activation: str,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, on packed weights.

    Args:
        x: ``[T, H]`` of any float type; T may be 0.
        expert_index: integer ``[T, k]``; an index outside ``[0, E)`` contributes nothing.
        routing: float ``[T, k]``.
        gate_up_packed, gate_up_scale, down_packed, down_scale: as stored (docs/format.md).
        gate_up_signs, down_signs: one row of the stored signs.
        spec: from `spec_text`.
        activation: name of the activation of the gate, as in the model's config.

    Returns:
        ``[T, H]`` in the dtype of ``x``.
    """
    layer = parse_spec(spec)
    tensors = {
        "gate_up_proj": (gate_up_packed, gate_up_scale, gate_up_signs),
        "down_proj": (down_packed, down_scale, down_signs),
    }

    def weight(projection: str, expert: int) -> torch.Tensor:
        packed, scale, signs = tensors[projection]
        decoded = decode_weight(packed[expert], scale[expert], signs, layer.projection(projection))
        return decoded.to(x.dtype)

    experts = gate_up_packed.shape[0]
    return experts_forward(x, expert_index, routing, experts, weight, activation)


moe_experts = torch.library.custom_op("erniequant::moe_experts", mutates_args=())(_in_plain_torch)


@moe_experts.register_fake
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@moe_experts.register_kernel("cuda")
def _on_cuda(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up_packed: torch.Tensor, gate_up_scale: torch.Tensor, gate_up_signs: torch.Tensor,
    down_packed: torch.Tensor, down_scale: torch.Tensor, down_signs: torch.Tensor,
    spec: str, activation: str,
) -> torch.Tensor:  # fmt: skip
    gate_up = (gate_up_packed, gate_up_scale, gate_up_signs)
    down = (down_packed, down_scale, down_signs)
    if x.dtype not in KERNEL_DTYPES or activation != "silu":
        return _in_plain_torch(x, expert_index, routing, *gate_up, *down, spec, activation)
    return run_kernels(x, expert_index, routing, gate_up, down, parse_spec(spec))


def run_kernels(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up: tuple[torch.Tensor, ...], down: tuple[torch.Tensor, ...], spec: LayerSpec,
) -> torch.Tensor:  # fmt: skip
    """`moe_experts` by Triton kernels; ``gate_up`` and ``down`` are packed, scale and signs."""
    from erniequant_kernels.moe import PackedMatrices, moe_experts
    from erniequant_kernels.tuning import tuning_for

    def matrices(tensors: tuple[torch.Tensor, ...], how: MatrixSpec) -> PackedMatrices:
        packed, scale, signs = tensors
        return PackedMatrices(packed, scale, signs, how.conv(), how.tile, how.rotation_block)

    # Triton launches on the current device, which in a model over several is often another one.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return moe_experts(
            x.contiguous(), expert_index, routing, matrices(gate_up, spec.gate_up_proj),
            matrices(down, spec.down_proj), tuning_for(x.device),
        )  # fmt: skip


def spec_text(spec: LayerSpec) -> str:
    """A layer's spec as an argument of the operator: ``cc2,12,256,128 cc4,13,256,128``."""
    both = (spec.gate_up_proj, spec.down_proj)
    return " ".join(f"{m.code},{m.register_length},{m.tile},{m.rotation_block}" for m in both)


@cache
def parse_spec(text: str) -> LayerSpec:
    """Inverse of `spec_text`."""
    split = (matrix.split(",") for matrix in text.split())
    return LayerSpec(*(MatrixSpec(code, *map(int, sizes)) for code, *sizes in split))
