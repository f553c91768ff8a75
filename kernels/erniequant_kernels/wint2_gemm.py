# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Multiply tokens with experts in Baidu's WINT2 format, decoding as it goes. docs/ccq.md describes
the format.

Weights are the first operand of the matrix instruction (outputs by inputs) and tokens the second. A
byte is four inputs of one output, which is what one lane of the instruction holds of a row: words
become labels in the registers that the instruction reads, and nothing goes through memory.

A label times its local scale, the *scaled label*, is rounded to bfloat16: integers up to 256 are
exact, and larger ones are rounded as bfloat16 weights would be. Super scales are left to the
consumer, which multiplies sums by them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from erniequant.codes.ccq.decode import decode_wint2
from erniequant.errors import ErnieQuantError
from erniequant_kernels import wint2_decode as decode
from erniequant_kernels.bfloat16 import MATRIX_TYPE, rounded
from erniequant_kernels.dense_gemm import dense_gemm_reference
from erniequant_kernels.dependent import start_next_and_wait
from erniequant_kernels.launch import launch
from erniequant_kernels.matrices import Wint2Matrices
from erniequant_kernels.routing import RowTiles, tile_assignments

LOAD_BYTES = 32
"""Rows of bytes are loaded so many at a time: outputs must be a multiple of it."""

TURN = 128
"""Inputs of a turn of the loop: two groups, whose local scales share a byte."""


@dataclass(frozen=True)
class Wint2GemmConfig:
    """How a product is cut up.

    Attributes:
        block_m: tokens of a row tile, a power of two from 8.
        block_n: outputs of a program, a power of two of at least 32 for each warp.
        block_k: inputs of one matrix product: 16, 32 or 64. With fewer, fewer registers wait to be
            filled; instructions of warp groups want more.
        splits: parts into which the inputs are cut, summed by the consumer in a fixed order; no
            more than K / 128.
        warps: warps of a program.
        stages: turns whose loads are under way at once.
        warp_group: whether Triton multiplies with the instruction of warp groups (four warps or
            more on sm_90). Lanes hold other inputs there; a wrong value costs time, nothing else.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    warp_group: bool = False


def wint2_gemm_reference(
    x: torch.Tensor, matrix: Wint2Matrices, expert_index: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The product in plain torch, float32 ``[A, N]``: ``(labels * scales)[expert] @ x[row]``.

    Args:
        x: ``[rows, K]``; assignment ``a`` reads row ``a // top_k``.
        expert_index: integer ``[A]``; assignments to no expert stay zero.
    """
    codes, scales, supers, code_scale, code_zp = matrix.parts
    one = torch.ones_like(supers)
    weights = decode_wint2(codes, scales, one, code_scale, code_zp, k_order=matrix.k_order).mT
    return dense_gemm_reference(x, weights, expert_index, top_k)


@triton.jit(do_not_specialize=["assignments"])
def wint2_gemm_kernel(
    x_ptr,
    code_ptr,
    local_ptr,
    code_scale_ptr,
    code_zp_ptr,
    constants_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    tile_end_ptr,
    out_ptr,
    assignments,
    TOP_K: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MMA64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    WARP_GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Program (row tile and block of outputs, split): BLOCK_N outputs for one row tile.

    Codes and local scales are words of four bytes, int32 ``[E, INPUTS / 4, OUTPUTS / 4]`` and ``[E,
    INPUTS / 128, OUTPUTS / 4]``; ``out`` is ``[splits, assignments, OUTPUTS]``.
    """
    start_next_and_wait(DEPENDENT)
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    WORDS: tl.constexpr = OUTPUTS // 4
    TURNS: tl.constexpr = INPUTS // 128
    PARTS: tl.constexpr = 64 // BLOCK_K  # of a group
    PART_BYTES: tl.constexpr = BLOCK_K // 16 if MMA64 else BLOCK_K // 4
    row_tile = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    expert = tl.load(tile_expert_ptr + row_tile).to(tl.int64)
    if expert < 0:
        return

    assignment, inside = tile_assignments(
        order_ptr, tile_first_ptr, tile_end_ptr, row_tile, BLOCK_M
    )
    x_row = (assignment // TOP_K * INPUTS)[None, :]

    output = block * BLOCK_N + decode.output_of_row(BLOCK_N, WARPS)
    of_output = expert * OUTPUTS + output
    scale = tl.load(code_scale_ptr + of_output, mask=output < OUTPUTS, other=0)
    scale = tl.where(output % 2 == 0, scale, scale / 256)[:, None]
    code_zp = tl.load(code_zp_ptr + of_output, mask=output < OUTPUTS, other=0)[:, None]
    offset = scale * -decode.TWO_23

    local_ptrs = local_ptr + expert * (TURNS * WORDS)
    local_ptrs += decode.local_offsets(block, BLOCK_N, OUTPUTS)
    code_ptrs = code_ptr + expert * (INPUTS // 4 * WORDS)
    code_ptrs += decode.code_offsets(block, BLOCK_N, BLOCK_K, OUTPUTS, MMA64)
    k = tl.arange(0, BLOCK_K)[:, None]
    zero = tl.arange(0, 1)
    constants_ptrs = constants_ptr + zero[:, None] + zero[None, :]

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for turn in range(TURNS * split // splits, TURNS * (split + 1) // splits):
        add_128 = tl.load(constants_ptrs).to(tl.uint32, bitcast=True)
        add_2_23 = tl.load(constants_ptrs + 1).to(tl.uint32, bitcast=True)
        local = tl.load(local_ptrs + turn * WORDS).to(tl.uint32, bitcast=True)
        nibbles = decode.local_rows(decode.nibble_pairs(local), BLOCK_N, WARPS)
        codes_here = code_ptrs + turn * (2 * decode.GROUP_BYTES * WORDS)
        x_here = x_ptr + turn * (2 * decode.GROUP)
        for half in tl.static_range(2):
            # The high nibble belongs to the even group.
            local_scale, zero_point = decode.local_scales(nibbles >> (4 - 4 * half), add_128)
            for part in tl.static_range(PARTS):
                first_byte = half * decode.GROUP_BYTES + part * PART_BYTES
                codes = tl.load(codes_here + first_byte * WORDS)
                # The offsets are added here: as pointers they would fill registers.
                x = tl.load(x_here + half * decode.GROUP + part * BLOCK_K + x_row + k)
                numbers = decode.byte_numbers(codes.to(tl.uint32, bitcast=True), add_2_23)
                numbers = decode.code_rows(numbers, BLOCK_N, BLOCK_K, WARPS)
                words = decode.code_words(numbers, scale, offset, code_zp)
                first, second = decode.label_pairs(words, add_128)
                first = decode.fma_pairs(first, local_scale, zero_point)
                second = decode.fma_pairs(second, local_scale, zero_point)
                weights = decode.operand(first, second, BLOCK_N, BLOCK_K, WARP_GROUP)
                x = decode.operand_inputs(x, BLOCK_K, BLOCK_M, MMA64, WARP_GROUP)
                total = tl.dot(weights.to(MATRIX_TYPE), x.to(MATRIX_TYPE), total)

    # Loaded again rather than kept in registers through the loop.
    assignment, inside = tile_assignments(
        order_ptr, tile_first_ptr, tile_end_ptr, row_tile, BLOCK_M
    )
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    out_row = split.to(tl.int64) * assignments + assignment
    place = out_ptr + out_row[None, :] * OUTPUTS + output[:, None]
    total = rounded(decode.by_output(total, BLOCK_N, BLOCK_M, WARPS), out_ptr.dtype.element_ty)
    tl.store(place, total, mask=(output < OUTPUTS)[:, None] & inside[None, :])


def wint2_gemm(
    x: torch.Tensor, matrix: Wint2Matrices, tiles: RowTiles, top_k: int, out: torch.Tensor,
    config: Wint2GemmConfig,
) -> None:  # fmt: skip
    """Products of all assignments with their experts' scaled labels; super scales are left to the
    consumer.

    Args:
        x: bfloat16 ``[rows, K]``, contiguous; assignment ``a`` reads row ``a // top_k``.
        matrix: words have to lie in int32.
        tiles: row tiles of ``config.block_m``.
        out: ``[config.splits, A, N]`` of any float type, contiguous; rows of assignments to no
            expert are left as they are.

    Raises:
        ErnieQuantError: N is not a multiple of 32; see `launch` and `kept_on_device`.
    """
    outputs = matrix.outputs
    if outputs % LOAD_BYTES:
        raise ErnieQuantError(f"{outputs} outputs: the kernel needs a multiple of {LOAD_BYTES}")
    blocks = triton.cdiv(outputs, config.block_n)
    codes, local = (part.view(torch.int32) for part in (matrix.quant_weight, matrix.weight_scale))
    launch(
        wint2_gemm_kernel, (tiles.expert.numel() * blocks, config.splits),
        x, codes, local, matrix.code_scale, matrix.code_zp, decode.wint2_constants(x.device),
        tiles.order, tiles.expert, tiles.first, tiles.end, out, out.shape[1],
        TOP_K=top_k, INPUTS=matrix.inputs, OUTPUTS=outputs, MMA64=matrix.k_order == "mma64",
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, WARPS=config.warps,
        WARP_GROUP=config.warp_group, num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=False,
    )  # fmt: skip
