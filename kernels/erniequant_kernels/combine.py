# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Sum the outputs of a token's experts by routing weight, always in the same order."""

import torch
import triton
import triton.language as tl

from erniequant_kernels.bfloat16 import from_pattern, rounded
from erniequant_kernels.dependent import wait
from erniequant_kernels.launch import launch
from erniequant_kernels.routing import assigned_scales

BLOCK_N = 512


def combine_reference(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor
) -> torch.Tensor:
    """`combine` in plain torch; float32 ``[T, H]``."""
    tokens, top_k = expert_index.shape
    scales, valid = assigned_scales(scale, expert_index)
    y = partial.float().sum(0).view(tokens, top_k, -1) * scales * routing.float()[..., None]
    return torch.where(valid[..., None], y, 0.0).sum(1)


@triton.jit(do_not_specialize=["assignments", "splits"])
def combine_kernel(
    partial_ptr,
    scale_ptr,
    expert_index_ptr,
    routing_ptr,
    out_ptr,
    assignments,
    splits,
    EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Program (token, n): BLOCK_N outputs of one token."""
    wait(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        assignment = token * TOP_K + slot
        expert = tl.load(expert_index_ptr + assignment).to(tl.int64)
        # Values of no expert may be anything in memory: masked, not multiplied by zero.
        valid = output < tl.where((expert >= 0) & (expert < EXPERTS), OUTPUTS, 0)
        weight = tl.load(routing_ptr + assignment).to(tl.float32)
        y = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for split in range(0, splits):
            row = split * assignments + assignment
            y += tl.load(partial_ptr + row * OUTPUTS + output, mask=valid, other=0).to(tl.float32)
        scale = from_pattern(tl.load(scale_ptr + expert * OUTPUTS + output, mask=valid, other=0))
        total += tl.where(valid, y * scale * weight, 0.0)
    pointers = out_ptr + token * OUTPUTS + output
    tl.store(pointers, rounded(total, out_ptr.dtype.element_ty), mask=output < OUTPUTS)


def combine(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor,
    routing: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Weighted sums of expert outputs.

    Args:
        partial: ``[splits, T * k, H]``, contiguous: summands of each assignment's output, unscaled.
        scale: int16 ``[E, H]``; expert_index: integer ``[T, k]``, no expert when out of range.
        routing: ``[T, k]`` of any float type, contiguous.
        out: ``[T, H]`` of any float type, contiguous; receives the result.
    """
    splits, assignments, outputs = partial.shape
    tokens, top_k = expert_index.shape
    launch(
        combine_kernel, (tokens, triton.cdiv(outputs, BLOCK_N)),
        partial, scale, expert_index, routing, out, assignments, splits,
        EXPERTS=scale.shape[0], OUTPUTS=outputs, TOP_K=top_k, BLOCK_N=BLOCK_N,
        num_warps=4,
    )  # fmt: skip
