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
WARPS = 2
"""Eight consecutive outputs a lane: bfloat16 results are loaded 16 bytes at a time. Hidden sizes of
the models are multiples of 512, so no lane idles."""


def combine_reference(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    scaled: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`combine` in plain torch; float32 ``[T, H]``."""
    tokens, top_k = expert_index.shape
    scales, valid = assigned_scales(scale, expert_index)
    y = partial.float().sum(0).view(tokens, top_k, -1) * routing.float()[..., None]
    return torch.where(valid[..., None], y if scaled else y * scales, 0.0).sum(1)


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
    ONE_SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Program (token, n): BLOCK_N outputs of one token."""
    wait(DEPENDENT)
    # Rows begin at 64-bit scalars; what differs between lanes takes 32 bits.
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        assignment = token * TOP_K + slot
        expert = tl.load(expert_index_ptr + assignment)
        valid = (expert >= 0) & (expert < EXPERTS)
        # Values of no expert may be anything in memory: not loaded, rather than multiplied by zero.
        # Its routing weight may be anything too.
        mask = valid if OUTPUTS % BLOCK_N == 0 else output < tl.where(valid, OUTPUTS, 0)
        weight = tl.where(valid, tl.load(routing_ptr + assignment).to(tl.float32), 0.0)
        row = partial_ptr + assignment * OUTPUTS
        y = tl.load(row + output, mask=mask, other=0).to(tl.float32)
        if not ONE_SPLIT:
            for _ in range(1, splits):
                row += assignments.to(tl.int64) * OUTPUTS
                y += tl.load(row + output, mask=mask, other=0).to(tl.float32)
        if not SCALED:
            row = scale_ptr + expert.to(tl.int64) * OUTPUTS
            y *= from_pattern(tl.load(row + output, mask=mask, other=0))
        total += y * weight
    row = out_ptr + token * OUTPUTS
    mask = None if OUTPUTS % BLOCK_N == 0 else output < OUTPUTS
    tl.store(row + output, rounded(total, out_ptr.dtype.element_ty), mask=mask)


def combine(
    partial: torch.Tensor, scale: torch.Tensor, expert_index: torch.Tensor,
    routing: torch.Tensor, out: torch.Tensor, scaled: bool = False,
) -> None:  # fmt: skip
    """Weighted sums of expert outputs.

    Args:
        partial: ``[splits, T * k, H]``, contiguous: summands of each assignment's output.
        scale: int16 ``[E, H]``, contiguous; expert_index: integer ``[T, k]``, no expert when out of
            range.
        routing: ``[T, k]`` of any float type, contiguous.
        out: ``[T, H]`` of any float type, contiguous; receives the result.
        scaled: the one split carries its scales: of ``scale`` the number of experts counts alone.
    """
    splits, assignments, outputs = partial.shape
    tokens, top_k = expert_index.shape
    launch(
        combine_kernel, (tokens, triton.cdiv(outputs, BLOCK_N)),
        partial, scale, expert_index, routing, out, assignments, splits,
        EXPERTS=scale.shape[0], OUTPUTS=outputs, TOP_K=top_k, ONE_SPLIT=splits == 1, SCALED=scaled,
        BLOCK_N=BLOCK_N, num_warps=WARPS,
    )  # fmt: skip
