# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Decode experts in Baidu's WINT2 format to bfloat16 weights, once, for matrix products with many
rows. docs/ccq.md describes the format.

The word of a byte is made by two roundings in float32, as FastDeploy's reference does, so the
compiler must not fuse them; the weight is exact in float32 and rounded to bfloat16 once.
"""

import torch
import triton
import triton.language as tl

from erniequant.codes.ccq.decode import decode_wint2
from erniequant_kernels.bfloat16 import rounded

BLOCK_N = 64
WARPS = 4

GROUP = tl.constexpr(64)
GROUP_BYTES = tl.constexpr(16)


def expand_wint2_reference(
    quant_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    super_scales: torch.Tensor,
    code_scale: torch.Tensor,
    code_zp: torch.Tensor,
    *,
    k_order: str,
) -> torch.Tensor:
    """Weights of experts in plain torch: bfloat16 ``[E, N, K]``, as `expand_wint2`."""
    exact = decode_wint2(
        quant_weight, weight_scale, super_scales, code_scale, code_zp, k_order=k_order
    )
    return exact.mT.bfloat16().contiguous()


@triton.jit
def words(byte, code_scale, code_zp):
    """Words of bytes, int32; their low 15 bits count. float32, every step rounded."""
    return tl.floor(byte.to(tl.float32) * code_scale + code_zp + 0.5).to(tl.int32)


@triton.jit
def label(word, SHIFT: tl.constexpr):
    """The weight at bit SHIFT of a word, before scales: float32."""
    return (((word >> SHIFT) & 63) - 32).to(tl.float32)


@triton.jit
def natural_rows(MMA64: tl.constexpr):
    """The row of its group that each of the 64 stored positions holds."""
    p = tl.arange(0, GROUP)
    if MMA64:
        return (p // 2 % 8) * 8 + (p // 16) * 2 + p % 2
    else:
        return p


@triton.jit
def expand_wint2_kernel(
    byte_ptr,
    scale_ptr,
    super_ptr,
    code_scale_ptr,
    code_zp_ptr,
    out_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MMA64: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (n, g, e): BLOCK_N outputs of one group of 64 inputs of one expert."""
    expert = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < OUTPUTS
    # Out of range means: compute the last one again and do not store it.
    safe = tl.minimum(column, OUTPUTS - 1)
    of_output = expert * OUTPUTS + safe
    code_scale = tl.load(code_scale_ptr + of_output)[:, None]
    code_zp = tl.load(code_zp_ptr + of_output)[:, None]
    rows = group * GROUP_BYTES + tl.arange(0, GROUP_BYTES)
    byte_ptr += expert * (INPUTS // 4 * OUTPUTS)
    byte = tl.load(byte_ptr + rows[None, :] * OUTPUTS + safe[:, None])
    word = words(byte, code_scale, code_zp)
    # The high nibble belongs to the even group.
    scale_ptr += expert * (INPUTS // 128 * OUTPUTS) + group // 2 * OUTPUTS
    nibble = (tl.load(scale_ptr + safe).to(tl.int32) >> (4 - group % 2 * 4)) & 15
    scale = nibble.to(tl.float32) * tl.load(super_ptr + of_output).to(tl.float32)
    even = tl.join(label(word, 9), label(word, 3))
    odd = tl.join(label(word, 6), label(word, 0))
    labels = tl.reshape(tl.join(even, odd), (BLOCK_N, GROUP))
    weight = rounded(labels * scale[:, None], tl.bfloat16)
    pointers = out_ptr + expert * OUTPUTS * INPUTS + safe.to(tl.int64)[:, None] * INPUTS
    pointers += (group * GROUP + natural_rows(MMA64))[None, :]
    tl.store(pointers, weight, mask=inside[:, None])


def expand_wint2(
    quant_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    super_scales: torch.Tensor,
    code_scale: torch.Tensor,
    code_zp: torch.Tensor,
    out: torch.Tensor,
    *,
    k_order: str,
    block_n: int = BLOCK_N,
) -> None:
    """Decode experts.

    Args:
        quant_weight, weight_scale, super_scales, code_scale, code_zp: as in `decode_wint2` with one
            leading axis of experts, contiguous; words have to lie in int32.
        out: bfloat16 ``[E, N, K]``, contiguous; receives the weights.
        k_order: ``plain`` or ``mma64``.
        block_n: outputs of one program, a power of two.
    """
    experts, outputs, inputs = out.shape
    grid = (triton.cdiv(outputs, block_n), inputs // GROUP.value, experts)
    expand_wint2_kernel[grid](
        quant_weight, weight_scale, super_scales, code_scale, code_zp, out,
        INPUTS=inputs, OUTPUTS=outputs, MMA64=k_order == "mma64", BLOCK_N=block_n,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
