# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Decode whole experts to bfloat16 labels, once, for matrix products with many rows.

The scale of an output is left to whoever consumes the product, so that labels stay exact.
"""

import torch
import triton
import triton.language as tl

from erniequant.codes.reference import decode as reference_decode
from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels import decode
from erniequant_kernels.launch import launch

GROUPS_PER_PROGRAM = 16
BLOCK_K = 64
WARPS = 1
"""One warp passes labels of 2 and 4 bits through shared memory too, with one store and one load of
a matrix for each store of the result, but two take more issue slots per weight: 5.7 to 5.9 instead
of 4.1 at 2 bits, 10.0 to 10.6 instead of 7.3 to 8.0 at 4, 8.2 to 9.1 instead of 7.5 to 8.4 at 3
(counted on sm_80 and sm_90)."""


def expand_reference(packed: torch.Tensor, code: ConvolutionalCode, tile: int) -> torch.Tensor:
    """Labels of packed experts in plain torch: as `expand`, exact in bfloat16."""
    return reference_decode(packed, code, tile).to(torch.bfloat16)


@triton.jit
def _load_groups(
    packed_ptr, run, row, INPUTS: tl.constexpr, TILE_WORDS: tl.constexpr, STEP_BITS: tl.constexpr
):
    """The groups of every run and input row.

    Args:
        packed_ptr: the words of one expert, ``[tiles, INPUTS * TILE_WORDS]``.
        run: int32 ``[R]``, index of each run along the outputs; ``row``: int32 ``[K]``.

    Returns:
        Two tuples of uint32 ``[R, K]``, one entry per group of a run: the 32 bits that end with the
        group, and the bits before those, of which at least 8 are valid (a register needs 5).
    """
    RUN_WORDS: tl.constexpr = decode.run_length(STEP_BITS) * STEP_BITS // 4
    RUNS: tl.constexpr = TILE_WORDS // RUN_WORDS  # of one tile
    base = (run // RUNS) * (INPUTS * TILE_WORDS)
    first = run % RUNS * RUN_WORDS
    words = packed_ptr + base[:, None] + row[None, :] * TILE_WORDS
    last = (first + TILE_WORDS - 1) % TILE_WORDS
    before = tl.load(words + last[:, None]).to(tl.uint32, bitcast=True)
    if STEP_BITS == 4:
        two = tl.arange(0, 2)
        start = packed_ptr + base[:, None, None] + row[None, :, None] * TILE_WORDS
        both = tl.load(start + first[:, None, None] + two[None, None, :])
        even, odd = tl.split(both.to(tl.uint32, bitcast=True))
        return (even, odd), (before, even)
    elif STEP_BITS == 2:
        a = tl.load(words + first[:, None]).to(tl.uint32, bitcast=True)
        b = tl.load(words + (first + 1)[:, None]).to(tl.uint32, bitcast=True)
        # Four groups of two bytes end 16, 32, 48 and 64 bits into the run.
        newest = (decode._funnel(before, a, 16), a, decode._funnel(a, b, 16), b)
        return newest, (before >> 16, before, a >> 16, a)
    else:  # Triton 3.6 compiles what follows a branch that returns, so this is one
        a = tl.load(words + first[:, None]).to(tl.uint32, bitcast=True)
        b = tl.load(words + (first + 1)[:, None]).to(tl.uint32, bitcast=True)
        c = tl.load(words + (first + 2)[:, None]).to(tl.uint32, bitcast=True)
        # Four groups of three bytes end 24, 48, 72 and 96 bits into the run.
        newest = (
            decode._funnel(before, a, 8),
            decode._funnel(a, b, 16),
            decode._funnel(b, c, 24),
            c,
        )
        return newest, (before >> 8, a >> 16, b >> 24, b)


@triton.jit
def expand_kernel(
    packed_ptr,
    constants_ptr,
    out_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    STEP_BITS: tl.constexpr,
    LABEL: tl.constexpr,
    LENGTH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (k, n, e): RUNS runs of groups and BLOCK_K inputs of one expert."""
    PER_STEP: tl.constexpr = decode.weights_per_step(LABEL)
    PER_GROUP: tl.constexpr = 8 * PER_STEP
    RUN: tl.constexpr = decode.run_length(STEP_BITS)
    RUN_COUNT: tl.constexpr = OUTPUTS // PER_GROUP // RUN
    expert = tl.program_id(2).to(tl.int64)
    packed_ptr += expert * (OUTPUTS // PER_GROUP * STEP_BITS // 4 * INPUTS)
    out_ptr += expert * OUTPUTS * INPUTS
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (run < RUN_COUNT)[:, None] & (row < INPUTS)[None, :]
    # Out of range means: compute the last one again and do not store it.
    safe_run = tl.minimum(run, RUN_COUNT - 1)
    safe_row = tl.minimum(row, INPUTS - 1)
    newest, before = _load_groups(packed_ptr, safe_run, safe_row, INPUTS, TILE_WORDS, STEP_BITS)
    keep = decode.load_keep_bits(constants_ptr)
    for i in tl.static_range(RUN):
        for step in tl.static_range(8):
            products = decode.product(before[i], newest[i], step, STEP_BITS, LENGTH, MULTIPLIER)
            output = (RUN * run + i) * PER_GROUP + step * PER_STEP
            place = out_ptr + output[:, None] * INPUTS + row[None, :]
            weights = decode.label_weights(products, keep, LABEL)
            for j in tl.static_range(PER_STEP):
                tl.store(place + j * INPUTS, weights[j], mask=inside)


def expand(
    packed: torch.Tensor,
    constants: torch.Tensor,
    code: ConvolutionalCode,
    tile: int,
    out: torch.Tensor,
    *,
    block_k: int = BLOCK_K,
) -> None:
    """Decode experts.

    Args:
        packed: int32 ``[E, N / tile, K * words]``, contiguous.
        constants: from `decode.constants`, on the same device.
        out: bfloat16 ``[E, N, K]``, contiguous; receives the labels.
        block_k: inputs of one program, a power of two.
    """
    experts, outputs, inputs = out.shape
    run = decode.run_length(code.step_bits)
    runs = outputs // decode.group_weights(code) // run
    grid = (
        triton.cdiv(inputs, block_k),
        triton.cdiv(runs, GROUPS_PER_PROGRAM // run),
        experts,
    )
    launch(
        expand_kernel, grid,
        packed, constants, out,
        INPUTS=inputs, OUTPUTS=outputs, TILE_WORDS=code.words_per_sequence(tile),
        RUNS=GROUPS_PER_PROGRAM // run, BLOCK_K=block_k, num_warps=WARPS,
        **decode.code_constants(code),
    )  # fmt: skip
