# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""Multiply many tokens with the packed weights of their experts: decode, and multiply as bfloat16.

A program owns a tile of tokens by outputs with one accumulator. In every turn its lanes decode the
weights of some inputs, write them to shared memory and multiply them with plain inputs there, as
an ordinary product would. `packed_gemm` needs no shared memory, but a matrix instruction for every
form of its inputs and accumulators for every step: right for a handful of tokens.

What makes it cheap (counts: `erniequant bench static`):

* Consecutive outputs of one input row lie side by side in a lane, and in shared memory too: a
  masked product of the label ``pair`` is stored as it is, 16 bytes a store. With inputs side by
  side (weights as the first operand) every two weights took a permute, and a 2-bit weight 4.3
  issue slots instead of 2.8.
* Columns of the tile are ordered so that eight lanes which store together hit all banks, see
  `_column_order`; results are put in order when they are stored.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels import decode
from erniequant_kernels.bfloat16 import INTERPRETED, MATRIX_TYPE, from_pattern, rounded
from erniequant_kernels.dependent import start_next_and_wait, wait
from erniequant_kernels.launch import launch
from erniequant_kernels.packed_gemm import packed_gemm_reference
from erniequant_kernels.routing import RowTiles, assigned_scales, tile_assignments


@dataclass(frozen=True)
class FusedGemmConfig:
    """Tile sizes, powers of two.

    A lane decodes 64 outputs of an input at once (`unit_outputs`; 32 of 3 and 4 bits, or of a tile
    of 32): with fewer of them in a turn than a program has lanes, lanes decode the same twice.

    Attributes:
        block_m: tokens of a row tile, from 16; warp-group-wide instructions (sm_90) need 64.
        block_n: outputs of a program, from 64. A whole tile needs no word from outside, and inputs
            are fetched less often.
        block_k: inputs of one turn of the loop, from 16; must divide the inputs.
        warps: warps of a program.
        stages: turns whose loads are under way at once.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@triton.constexpr_function
def unit_words(tile_words, step_bits):
    """Words that a lane loads at once: two runs if they lie in one tile, else one run.

    That is 16 bytes, 8 for the smallest tiles, and three words of 3-bit steps.
    """
    if step_bits == 3:
        return 3
    return 4 if tile_words % 4 == 0 else 2


@triton.constexpr_function
def _unit_runs(tile_words, step_bits):
    return unit_words(tile_words, step_bits) * 4 // step_bits // decode.run_length(step_bits)


@triton.constexpr_function
def unit_outputs(tile_words, step_bits, per_step):
    """Outputs of one unit: 32 or 64."""
    runs = _unit_runs(tile_words, step_bits)
    return runs * decode.run_length(step_bits) * decode.STEPS * per_step


@triton.constexpr_function
def _column_order(outputs, block_n):
    """How columns ``[outer units, units, outer chunks, chunks]`` of eight outputs are regrouped.

    Shared memory keeps 64 columns of an input row in 128 bytes, and its swizzle spreads one chunk
    (16 bytes) of eight consecutive rows over all banks. Of eight lanes that store together, the
    first few hold the units of one row: their number times that of rows is eight. So units take the
    upper bits of a chunk's place within its 128 bytes, and the row toggles the lower ones.
    """
    units, chunks = block_n // outputs, outputs // 8
    inner_units = min(units, 8)
    inner_chunks = min(chunks, 8 // inner_units)
    return (units // inner_units, inner_units, chunks // inner_chunks, inner_chunks)


@triton.constexpr_function
def _levels(parts):
    return parts.bit_length() - 1


@triton.jit
def _stack(parts):
    """``2^n`` tiles as one with ``n`` more dimensions, the first part first."""
    # The last dimension is the pair that is joined last, so halves of the list are joined first.
    LEVELS: tl.constexpr = _levels(len(parts))
    for _ in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    return parts[0]


@triton.jit
def _words_before(
    last_word, packed_ptr, first_unit, WORDS: tl.constexpr, INPUTS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """The word before each unit, around the tile: uint32 ``[K, U]`` from the last word of each.

    The lane beside has it; only where the program has part of a tile (its units start within one)
    the word before the first is loaded.
    """
    K: tl.constexpr = last_word.shape[0]
    UNITS: tl.constexpr = last_word.shape[1]
    TILE_UNITS: tl.constexpr = TILE_WORDS // WORDS
    AROUND: tl.constexpr = min(UNITS, TILE_UNITS)
    unit = tl.arange(0, UNITS)
    beside = unit // AROUND * AROUND + (unit + AROUND - 1) % AROUND
    before = tl.gather(last_word, tl.broadcast_to(beside[None, :], (K, UNITS)), 1)
    if UNITS < TILE_UNITS:
        tile = first_unit // TILE_UNITS * (INPUTS * TILE_WORDS)
        edge = tile + (first_unit % TILE_UNITS * WORDS + TILE_WORDS - 1) % TILE_WORDS
        row = tl.arange(0, K)[:, None] * TILE_WORDS
        edge_word = tl.load(packed_ptr + edge + row).to(tl.uint32, bitcast=True)
        before = tl.where((unit == 0)[None, :], edge_word, before)
    return before


@triton.jit
def _load_units(
    packed_ptr, first_unit, first_row, UNITS: tl.constexpr, K: tl.constexpr,
    UNIT_COUNT: tl.constexpr, INPUTS: tl.constexpr, TILE_WORDS: tl.constexpr,
    STEP_BITS: tl.constexpr,
):  # fmt: skip
    """The groups of every input row and unit, as from `decode.load_groups`.

    Words of a row are one dimension of what is loaded, 16 bytes a lane, and three-word units are
    loaded flat: Triton 3.6 lets lanes run along the dimension that has neighbours in memory and,
    where there is none, along the wrong one.

    Args:
        packed_ptr: the words of one expert, ``[tiles, INPUTS * TILE_WORDS]``.
        first_unit: index along the outputs of the first of ``UNITS`` (``U``); units from
            ``UNIT_COUNT`` on do not exist and are not read.
        first_row: index of the first of ``K`` inputs.

    Returns:
        Two tuples of uint32 ``[K, U]`` or, with two runs to a unit, ``[K, U, 2]``, one entry per
        group of a run: the 32 bits that end with the group, and the bits before those.
    """
    WORDS: tl.constexpr = unit_words(TILE_WORDS, STEP_BITS)
    TILE_UNITS: tl.constexpr = TILE_WORDS // WORDS
    packed_ptr += first_row * TILE_WORDS
    if STEP_BITS == 3:
        # Three words are no power of two. Lanes stay 12 bytes apart, and level one has the rest of
        # the line when the next word is loaded.
        place = tl.arange(0, K * UNITS)
        unit = first_unit + place % UNITS
        if UNIT_COUNT % UNITS:
            unit = tl.minimum(unit, UNIT_COUNT - 1)
        first = unit % TILE_UNITS * WORDS
        tile = unit // TILE_UNITS * (INPUTS * TILE_WORDS) + place // UNITS * TILE_WORDS
        at = packed_ptr + tile + first
        a = tl.reshape(tl.load(at).to(tl.uint32, bitcast=True), (K, UNITS))
        b = tl.reshape(tl.load(at + 1).to(tl.uint32, bitcast=True), (K, UNITS))
        c = tl.reshape(tl.load(at + 2).to(tl.uint32, bitcast=True), (K, UNITS))
        before = _words_before(c, packed_ptr, first_unit, WORDS, INPUTS, TILE_WORDS)
        return decode.groups_of_three(before, a, b, c)
    else:
        words = packed_ptr + tl.arange(0, K)[:, None] * TILE_WORDS
        word = first_unit * WORDS + tl.arange(0, UNITS * WORDS)
        at = words + (word // TILE_WORDS * (INPUTS * TILE_WORDS) + word % TILE_WORDS)[None, :]
        if UNIT_COUNT % UNITS == 0:
            loaded = tl.load(at)
        else:
            loaded = tl.load(at, mask=(word < UNIT_COUNT * WORDS)[None, :], other=0)
        loaded = loaded.to(tl.uint32, bitcast=True)
        if WORDS == 4:
            even, odd = tl.split(tl.reshape(loaded, (K, UNITS, 2, 2)))
            inner, last_word = tl.split(odd)
        else:
            even, odd = tl.split(tl.reshape(loaded, (K, UNITS, 2)))
            last_word = odd
        before = _words_before(last_word, packed_ptr, first_unit, WORDS, INPUTS, TILE_WORDS)
        if WORDS == 4:
            before = tl.join(before, inner)
        return decode.groups_of_two(before, even, odd, STEP_BITS)


# Both halves of two masked products, then the two sums. A sum of bfloat16 halves of one register is
# one instruction that picks its halves; adding first halves to second ones takes two permutes.
_HALF_SUM = tl.constexpr("""{
    .reg .b32 a, b; .reg .b16 low, high, first, second, one;
    mov.b16 one, 0x3F80;
    lop3.b32 a, $1, $3, 0x3F003F00, 0x6A;
    lop3.b32 b, $2, $3, 0x3F003F00, 0x6A;
    mov.b32 {low, high}, a;
    fma.rn.bf16 first, low, one, high;
    mov.b32 {low, high}, b;
    fma.rn.bf16 second, low, one, high;
    mov.b32 $0, {first, second}; }""")


@triton.jit
def _weights(
    products, keep_bits, LABEL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """uint32 products ``[BLOCK_K, BLOCK_N / weights per step]`` to weights, bfloat16.

    The assembly is there for what the compiler does with a tile that it traces back to joins. It
    would give the matrix operands (sm_80, or fewer than 64 tokens) a layout that is not loaded from
    shared memory by matrices (10 issue slots instead of 4), and shared memory for a warp-group-wide
    instruction the shape before joining, which it then rejects. ``is_pure`` would be looked
    through.
    """
    if INTERPRETED or LABEL != "half_sum":
        weights = decode.label_weights(products, keep_bits, LABEL)
        if len(weights) == 2:
            tile = tl.reshape(tl.join(weights[0], weights[1]), (BLOCK_K, BLOCK_N))
        else:
            tile = weights[0]
        if not INTERPRETED:
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], dtype=tl.bfloat16, is_pure=False, pack=2
            )
    else:
        tile = tl.inline_asm_elementwise(
            _HALF_SUM, "=r,r,r,r,r", [products, keep_bits], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    return tile


def fused_gemm_reference(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, code: ConvolutionalCode, tile: int,
    expert_index: torch.Tensor, top_k: int,
) -> torch.Tensor:  # fmt: skip
    """The product in plain torch, float32 ``[A, N]``: ``scale * labels[expert] @ x[row]``.

    Args:
        x: rotated inputs ``[rows, K]``; assignment ``a`` reads row ``a // top_k``.
        packed: int32 ``[E, N / tile, K * words]``; scale: int16 ``[E, N, 1]``.
        expert_index: integer ``[A]``; assignments to no expert stay zero.
    """
    scales, _ = assigned_scales(scale.flatten(1), expert_index)
    return packed_gemm_reference(x, packed, code, tile, expert_index, top_k) * scales


@triton.jit
def fused_gemm_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    constants_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    tile_end_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    STEP_BITS: tl.constexpr,
    LABEL: tl.constexpr,
    LENGTH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST: tl.constexpr = False,
    DEPENDENT: tl.constexpr = False,
):
    """Program (row tile and block of outputs): blocks of one row tile, then the next tile of the
    same expert, so that all programs at work share inputs and words in the level-2 cache.

    No integer is an argument: token counts reach the kernel through ``tile_*_ptr`` alone.
    """
    if LAST:
        wait(DEPENDENT)
    else:
        start_next_and_wait(DEPENDENT)
    PER_STEP: tl.constexpr = decode.weights_per_step(LABEL)
    RUN: tl.constexpr = decode.run_length(STEP_BITS)
    LANE: tl.constexpr = unit_outputs(TILE_WORDS, STEP_BITS, PER_STEP)
    UNITS: tl.constexpr = BLOCK_N // LANE
    ORDER: tl.constexpr = _column_order(LANE, BLOCK_N)
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    row_tile = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    expert = tl.load(tile_expert_ptr + row_tile).to(tl.int64)
    if expert < 0:
        return

    assignment, inside = tile_assignments(
        order_ptr, tile_first_ptr, tile_end_ptr, row_tile, BLOCK_M
    )
    x_ptrs = (x_ptr + assignment // TOP_K * INPUTS)[:, None]

    packed_ptr += expert * (OUTPUTS // LANE * unit_words(TILE_WORDS, STEP_BITS) * INPUTS)
    keep = decode.load_keep_bits(constants_ptr)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for turn in range(0, INPUTS // BLOCK_K):
        first_row = turn * BLOCK_K
        x = tl.load(x_ptrs + (first_row + tl.arange(0, BLOCK_K))[None, :])
        newest, before = _load_units(
            packed_ptr, block * UNITS, first_row, UNITS, BLOCK_K, OUTPUTS // LANE, INPUTS,
            TILE_WORDS, STEP_BITS,
        )  # fmt: skip
        products = ()
        for g in tl.static_range(RUN):
            for step in tl.static_range(8):
                products = products + (
                    decode.product(before[g], newest[g], g, step, STEP_BITS, LENGTH, MULTIPLIER),
                )
        tile = tl.reshape(
            _stack(products), (BLOCK_K, ORDER[0], ORDER[1], ORDER[2], ORDER[3] * 8 // PER_STEP)
        )
        tile = tl.reshape(tl.permute(tile, (0, 1, 3, 2, 4)), (BLOCK_K, BLOCK_N // PER_STEP))
        weights = _weights(tile, keep, LABEL, BLOCK_K, BLOCK_N)
        total = tl.dot(x.to(MATRIX_TYPE), weights.to(MATRIX_TYPE), total)

    # Scaled as columns are ordered here: a scale per output changes lanes, not all results twice.
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_ptr += expert * OUTPUTS
    if OUTPUTS % BLOCK_N:
        scale = tl.load(scale_ptr + output, mask=output < OUTPUTS, other=0)
    else:
        scale = tl.load(scale_ptr + output)
    scale = tl.reshape(scale, (ORDER[0], ORDER[1], ORDER[2], ORDER[3] * 8))
    scale = tl.reshape(tl.permute(scale, (0, 2, 1, 3)), (BLOCK_N,))
    total *= from_pattern(scale)[None, :]
    result = tl.reshape(
        rounded(total, out_ptr.dtype.element_ty),
        (BLOCK_M, ORDER[0], ORDER[2], ORDER[1], ORDER[3] * 8),
    )
    result = tl.reshape(tl.permute(result, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))
    place = out_ptr + assignment[:, None] * OUTPUTS + output[None, :]
    mask = inside[:, None]
    if OUTPUTS % BLOCK_N:
        mask = mask & (output < OUTPUTS)[None, :]
    tl.store(place, result, mask=mask)


def fused_gemm(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, constants: torch.Tensor,
    code: ConvolutionalCode, tile: int, tiles: RowTiles, top_k: int, out: torch.Tensor,
    config: FusedGemmConfig, *, last: bool = False,
) -> None:  # fmt: skip
    """Products of all assignments with their experts' labels, scaled before they are rounded.

    Args:
        x: rotated inputs, bfloat16 ``[rows, K]``, contiguous; assignment ``a`` reads row
            ``a // top_k``.
        packed: int32 ``[E, N / tile, K * words]``, contiguous.
        scale: int16 ``[E, N, 1]``, contiguous.
        constants: from `decode.constants`.
        tiles: row tiles of ``config.block_m``.
        out: ``[A, N]`` of any float type, contiguous; rows of assignments to no expert are left as
            they are.
        last: no kernel of ours follows (see `dependent.wait`).
    """
    outputs = out.shape[-1]
    blocks = triton.cdiv(outputs, config.block_n)
    launch(
        fused_gemm_kernel, (tiles.expert.numel() * blocks,),
        x, packed, scale, constants, tiles.order, tiles.expert, tiles.first, tiles.end, out,
        TOP_K=top_k, INPUTS=x.shape[-1], OUTPUTS=outputs,
        TILE_WORDS=code.words_per_sequence(tile),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        LAST=last, num_warps=config.warps, num_stages=config.stages, **decode.code_constants(code),
    )  # fmt: skip
