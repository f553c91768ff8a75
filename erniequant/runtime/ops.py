"""The experts of a layer as one operator of torch: kernels on CUDA and on the CPU, plain torch
elsewhere and for what they do not take.

`erniequant::moe_experts` is opaque to `torch.compile` and can be captured in a CUDA graph. On a GPU
the size of its workspace is `erniequant_kernels.moe.Plan.workspace_bytes`; weights stay packed,
except where many tokens per expert make it cheaper to decode a few experts at a time into that
workspace. On the CPU they always stay packed.
"""

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from erniequant.packing.decoding import Decode, decode_weight
from erniequant.packing.products import (
    DIFFERENTIABLE,
    WeightOf,
    experts_backward,
    experts_forward,
)
from erniequant.packing.schema import LayerSpec, MatrixSpec
from erniequant.runtime.cards import runs_kernels
from erniequant.runtime.decoding import decode_fast

if TYPE_CHECKING:
    from erniequant_kernels.matrices import PackedMatrices

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""Activations that the kernels on a GPU take; float32 asks for more precision than they have."""

CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Activations that the products on the CPU take."""


def takes(device: torch.device, dtype: torch.dtype, activation: str = "silu") -> bool:
    """Whether there are kernels for activations of a dtype on a device."""
    if activation != "silu":
        return False
    if device.type == "cuda":
        return dtype in KERNEL_DTYPES and runs_kernels(device)
    return device.type == "cpu" and dtype in CPU_DTYPES


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
        gate_up_signs, down_signs: the stored signs, or one row of them: all are equal.
        spec: from `spec_text`.
        activation: name of the activation of the gate, as in the model's config.

    Returns:
        ``[T, H]`` in the dtype of ``x``.
    """
    gate_up = (gate_up_packed, gate_up_scale, gate_up_signs)
    down = (down_packed, down_scale, down_signs)
    weight = _decoder(gate_up, down, parse_spec(spec), x.dtype)
    experts = gate_up_packed.shape[0]
    return experts_forward(x, expert_index, routing, experts, weight, activation)


def _decoder(
    gate_up: tuple[torch.Tensor, ...], down: tuple[torch.Tensor, ...], spec: LayerSpec,
    dtype: torch.dtype, decode: Decode = decode_weight,
) -> WeightOf:  # fmt: skip
    """Decodes one expert at a time; ``gate_up`` and ``down`` are packed, scale and signs."""
    tensors = {"gate_up_proj": gate_up, "down_proj": down}

    def weight(projection: str, expert: int) -> torch.Tensor:
        packed, scale, signs = tensors[projection]
        row = signs.reshape(-1, signs.shape[-1])[0]
        decoded = decode(packed[expert], scale[expert], row, spec.projection(projection))
        return decoded.to(dtype)

    return weight


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
    if not takes(x.device, x.dtype, activation):
        return _in_plain_torch(x, expert_index, routing, *gate_up, *down, spec, activation)
    return run_kernels(x, expert_index, routing, gate_up, down, parse_spec(spec))


@moe_experts.register_kernel("cpu")
def _on_cpu(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up_packed: torch.Tensor, gate_up_scale: torch.Tensor, gate_up_signs: torch.Tensor,
    down_packed: torch.Tensor, down_scale: torch.Tensor, down_signs: torch.Tensor,
    spec: str, activation: str,
) -> torch.Tensor:  # fmt: skip
    gate_up = (gate_up_packed, gate_up_scale, gate_up_signs)
    down = (down_packed, down_scale, down_signs)
    if not takes(x.device, x.dtype, activation):
        return _in_plain_torch(x, expert_index, routing, *gate_up, *down, spec, activation)
    from erniequant_kernels.cpu.moe import moe_experts_cpu

    both = _matrices(gate_up, down, parse_spec(spec))
    return moe_experts_cpu(x, expert_index, routing, *both)


@torch.library.custom_op("erniequant::moe_experts_backward", mutates_args=())
def moe_experts_backward(
    grad: torch.Tensor, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up_packed: torch.Tensor, gate_up_scale: torch.Tensor, gate_up_signs: torch.Tensor,
    down_packed: torch.Tensor, down_scale: torch.Tensor, down_signs: torch.Tensor,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `moe_experts` with "silu" for ``x`` and ``routing``, in plain torch everywhere.

    grad: ``[T, H]``, of the output; the rest as in `moe_experts`.
    """
    gate_up = (gate_up_packed, gate_up_scale, gate_up_signs)
    down = (down_packed, down_scale, down_signs)
    weight = _decoder(gate_up, down, parse_spec(spec), x.dtype, decode_fast)
    return experts_backward(grad, x, expert_index, routing, len(gate_up_packed), weight)


@moe_experts_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    grad_x, grad_routing = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, routing)
    )
    return grad_x, grad_routing


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.spec, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if ctx.activation not in DIFFERENTIABLE:
        raise NotImplementedError(f"moe_experts has no gradient for {ctx.activation}")
    x, expert_index, routing, *packed = ctx.saved_tensors
    grad_x, grad_routing = moe_experts_backward(grad, x, expert_index, routing, *packed, ctx.spec)
    return (grad_x, None, grad_routing, *(None for _ in (*packed, ctx.spec, ctx.activation)))


moe_experts.register_autograd(_gradient, setup_context=_keep_inputs)


_autocast = torch.library.Library("erniequant", "FRAGMENT")


def _cast_first(key: str, device: str) -> None:
    """Let `moe_experts` under autocast run in its dtype, as linear layers do."""
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_run(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        # `register_autocast` knows one dtype for good, not the one of the moment.
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(without):
            return moe_experts(x.to(dtype), *rest)

    _autocast.impl("moe_experts", cast_and_run, key)


_cast_first("AutocastCUDA", "cuda")
_cast_first("AutocastCPU", "cpu")


def run_kernels(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up: tuple[torch.Tensor, ...], down: tuple[torch.Tensor, ...], spec: LayerSpec,
    card: torch.device | None = None,
) -> torch.Tensor:  # fmt: skip
    """`moe_experts` by Triton kernels; ``gate_up`` and ``down`` are packed, scale and signs.

    ``card`` is the device whose tuning to use where tensors have no memory.
    """
    from erniequant_kernels.moe import moe_experts
    from erniequant_kernels.tuning import tuning_for

    # Triton launches on the current device, which in a model over several is often another one.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return moe_experts(
            x.contiguous(), expert_index, routing, *_matrices(gate_up, down, spec),
            tuning_for(card or x.device),
        )  # fmt: skip


def _matrices(
    gate_up: tuple[Any, ...], down: tuple[Any, ...], spec: LayerSpec
) -> tuple["PackedMatrices", "PackedMatrices"]:
    from erniequant_kernels.matrices import PackedMatrices

    both = zip((gate_up, down), _codes(spec), strict=True)
    first, second = (PackedMatrices(*tensors, *how) for tensors, how in both)
    return first, second


@cache
def _codes(spec: LayerSpec) -> tuple[tuple[Any, ...], ...]:
    """Code, tile and rotation block of both projections."""
    both = (spec.gate_up_proj, spec.down_proj)
    return tuple((matrix.conv(), matrix.tile, matrix.rotation_block) for matrix in both)


def matrix_text(spec: MatrixSpec) -> str:
    """The spec of one matrix as an argument of an operator: ``cc2,12,256,128``."""
    return f"{spec.code},{spec.register_length},{spec.tile},{spec.rotation_block}"


@cache
def parse_matrix(text: str) -> MatrixSpec:
    """Inverse of `matrix_text`."""
    code, *sizes = text.split(",")
    return MatrixSpec(code, *map(int, sizes))


def spec_text(spec: LayerSpec) -> str:
    """A layer's spec as an argument of the operator: ``cc2,12,256,128 cc4,13,256,128``."""
    return " ".join(map(matrix_text, (spec.gate_up_proj, spec.down_proj)))


@cache
def parse_spec(text: str) -> LayerSpec:
    """Inverse of `spec_text`."""
    return LayerSpec(*map(parse_matrix, text.split()))
