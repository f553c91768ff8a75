# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Multiply tokens with the packed weights of their experts, decoding as it goes.

Weights are the first operand of the matrix instruction (groups of outputs by inputs) and tokens the
second, so a handful of tokens fills an instruction that is 16 by 8. Each of the eight steps of a
group has accumulators of its own: no weight ever crosses a lane, and none goes through memory.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from erniequant.codes.reference import decode as reference_decode
from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels import decode
from erniequant_kernels.dense_gemm import dense_gemm_reference
from erniequant_kernels.dependent import start_next_and_wait
from erniequant_kernels.launch import launch
from erniequant_kernels.routing import RowTiles, tile_assignments


@dataclass(frozen=True)
class PackedGemmConfig:
    """How a packed product is cut up.

    Attributes:
        block_m: tokens of a row tile, a power of two from 8.
        block_k: inputs of one turn of the loop, a power of two; must divide the inputs.
        splits: equal parts into which the turns are cut, summed by the consumer in a fixed order.
        warps: warps of a program, each with 16 groups (32 of three or two bytes).
        stages: turns whose loads are under way at once.
    """

    block_m: int
    block_k: int
    splits: int
    warps: int
    stages: int


def groups_per_warp(code: ConvolutionalCode) -> int:
    """Eight runs: the rows of one matrix instruction, or two for runs of four."""
    return 8 * decode.run_length(code.step_bits)


def packed_gemm_reference(
    x: torch.Tensor, packed: torch.Tensor, code: ConvolutionalCode, tile: int,
    expert_index: torch.Tensor, top_k: int,
) -> torch.Tensor:  # fmt: skip
    """The product in plain torch, float32 ``[A, N]``: ``labels[expert] @ x[row]``.

    Args:
        x: rotated inputs ``[rows, K]``; assignment ``a`` reads row ``a // top_k``.
        packed: int32 ``[E, N / tile, K * words]``.
        expert_index: integer ``[A]``; assignments to no expert stay zero.
    """
    return dense_gemm_reference(x, reference_decode(packed, code, tile), expert_index, top_k)


@triton.jit(do_not_specialize=["assignments"])
def packed_gemm_kernel(
    x_ptr,
    packed_ptr,
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
    TILE_WORDS: tl.constexpr,
    STEP_BITS: tl.constexpr,
    LABEL: tl.constexpr,
    LENGTH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Program (row tile and group block, split): GROUPS groups of outputs for one row tile.

    ``x`` is bf16 ``[rows, INPUTS]``, ``out`` float32 ``[SPLITS, assignments, OUTPUTS]``; each split
    takes an equal part of the turns.
    """
    start_next_and_wait(DEPENDENT)
    PER_STEP: tl.constexpr = decode.weights_per_step(LABEL)
    PER_GROUP: tl.constexpr = 8 * PER_STEP
    GROUP_COUNT: tl.constexpr = OUTPUTS // PER_GROUP
    BLOCKS: tl.constexpr = (GROUP_COUNT + GROUPS - 1) // GROUPS
    RUN: tl.constexpr = decode.run_length(STEP_BITS)
    RUNS: tl.constexpr = GROUPS // RUN
    WIDE: tl.constexpr = GROUPS * PER_GROUP
    # A number of turns that is known only at run time costs 5 % more issue slots: ptxas then moves
    # the guard of the loads from a uniform register to a predicate once a load.
    TURNS: tl.constexpr = INPUTS // BLOCK_K // SPLITS
    row_tile = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(1)
    expert = tl.load(tile_expert_ptr + row_tile).to(tl.int64)
    if expert < 0:
        return

    assignment, inside = tile_assignments(
        order_ptr, tile_first_ptr, tile_end_ptr, row_tile, BLOCK_M
    )
    x_ptrs = (x_ptr + assignment // TOP_K * INPUTS)[:, None] + tl.arange(0, BLOCK_K)[None, :]

    packed_ptr += expert * (GROUP_COUNT * STEP_BITS // 4 * INPUTS)
    sums = ()
    for _ in tl.static_range(8):
        sums = sums + (tl.zeros((GROUPS, PER_STEP * BLOCK_M), dtype=tl.float32),)
    x_ptrs += split * (TURNS * BLOCK_K)
    packed_ptr += split * (TURNS * BLOCK_K * TILE_WORDS)
    for _ in range(0, TURNS):
        newest, before = decode.load_groups(
            packed_ptr, block * RUNS, 0, GROUP_COUNT // RUN - 1, RUNS, BLOCK_K, INPUTS,
            TILE_WORDS, STEP_BITS, True,
        )  # fmt: skip
        x = decode.paired_inputs(tl.load(x_ptrs), BLOCK_M, BLOCK_K, LABEL)
        keep = decode.load_keep_bits(constants_ptr)
        updated = ()
        for i in tl.static_range(8):
            products = ()
            for g in tl.static_range(RUN):
                products = products + (
                    decode.product(
                        before[g], newest[g], g, decode.step_at(i, STEP_BITS), STEP_BITS, LENGTH,
                        MULTIPLIER,
                    ),
                )  # fmt: skip
            weights = decode.operand(products, keep, GROUPS, BLOCK_K)
            updated = updated + (tl.dot(weights, x, sums[i]),)
        sums = updated
        packed_ptr += BLOCK_K * TILE_WORDS
        x_ptrs += BLOCK_K

    # Loaded again rather than kept in registers through the loop.
    assignment, inside = tile_assignments(
        order_ptr, tile_first_ptr, tile_end_ptr, row_tile, BLOCK_M
    )
    out_row = split.to(tl.int64) * assignments + assignment
    output = block * WIDE + tl.arange(0, WIDE)
    mask = inside[:, None]
    if OUTPUTS % WIDE != 0:
        mask &= (output < OUTPUTS)[None, :]
    whole = decode.outputs_of(sums, GROUPS, BLOCK_M, STEP_BITS, LABEL)
    tl.store(out_ptr + out_row[:, None] * OUTPUTS + output[None, :], whole, mask=mask)


def packed_gemm(
    x: torch.Tensor, packed: torch.Tensor, constants: torch.Tensor, code: ConvolutionalCode,
    tile: int, tiles: RowTiles, top_k: int, out: torch.Tensor, config: PackedGemmConfig,
) -> None:  # fmt: skip
    """Products of all assignments with their experts' labels; scales are left to the consumer.

    Args:
        x: rotated inputs, bfloat16 ``[rows, K]``, contiguous; assignment ``a`` reads row
            ``a // top_k``.
        packed: int32 ``[E, N / tile, K * words]``, contiguous.
        constants: from `decode.constants`.
        tiles: row tiles of ``config.block_m``.
        out: float32 ``[config.splits, A, N]``, contiguous; rows of assignments to no expert are
            left as they are.
    """
    groups = config.warps * groups_per_warp(code)
    outputs = out.shape[-1]
    blocks = triton.cdiv(outputs // decode.group_weights(code), groups)
    launch(
        packed_gemm_kernel, (tiles.expert.numel() * blocks, config.splits),
        x, packed, constants, tiles.order, tiles.expert, tiles.first, tiles.end, out, out.shape[1],
        TOP_K=top_k, INPUTS=x.shape[-1], OUTPUTS=outputs,
        TILE_WORDS=code.words_per_sequence(tile),
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, GROUPS=groups, SPLITS=config.splits,
        num_warps=config.warps, num_stages=config.stages, **decode.code_constants(code),
    )  # fmt: skip
