# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Decode helpers for Triton kernels: words of the bit stream, products of registers, labels.

A kernel handles *groups* of eight steps: one 32-bit word of 4-bit steps, three bytes of 3-bit and
two of 2-bit steps. Every step of all groups of a tile is decoded at once with constant shifts, so a
weight stays in the lane that loaded its word.

The step says how words are cut into registers, the label how a register becomes weights; kernels
are told both, and nothing else depends on the width. A new label is a case of `weights_per_step`,
`label_weights` and, unless its product holds two bfloat16 halves as well, of `operand`.

What makes it cheap (counts: `erniequant bench static`):

* Groups are loaded in runs of neighbours, whole words (two of one word, four of three or two
  bytes): all but the first find the bits before them in their neighbour, and shifts of the run are
  constants. Words lie in shared memory in the order of the lanes that decode them, so that neither
  loading nor reading them costs more requests than their bytes do, whatever the tile size.
* Registers that lie 16 bits apart (15 for 3-bit steps) are cut out together: two of a group, or, of
  2-bit steps, one of each of two neighbouring groups. With ``v = low + (high << 16)`` and the
  multiplier ``m``, ``low * m = v * m - high * (m << 16)`` modulo 2^32: a multiplication in place of
  a shift and a mask, on the pipe that is idle.
* The masked product is an operand of the matrix instruction as it stands, see `operand`.
"""

import torch
import triton
import triton.language as tl

from erniequant.codes import labels
from erniequant.codes.spec import WORD_BITS, ConvolutionalCode
from erniequant_kernels.bfloat16 import MATRIX_TYPE

TOGGLE_BITS = tl.constexpr(labels.TOGGLE_BITS)
STEPS = 8
"""Steps of one group, whatever the code."""


@triton.constexpr_function
def run_length(step_bits):
    """Groups of a run, the neighbours that are loaded together: whole words."""
    return 2 if step_bits == 4 else 4


@triton.constexpr_function
def steps_apart(step_bits):
    """Steps between two registers that are cut out together: 16 stream bits, or 15.

    With 2-bit steps the other one is the same step of the group beside.
    """
    return 16 // step_bits


@triton.constexpr_function
def weights_per_step(label):
    """Weights that a label makes of one product."""
    return {"pair": 2, "half_sum": 1}[label]


def group_weights(code: ConvolutionalCode) -> int:
    """Weights of one group: consecutive outputs of one input row."""
    return STEPS * code.weights_per_step


def code_constants(code: ConvolutionalCode) -> dict[str, int | str]:
    """The constexpr arguments by which every kernel is told the code."""
    return {
        "STEP_BITS": code.step_bits,
        "LABEL": code.label.name,
        "LENGTH": code.register_length,
        "MULTIPLIER": code.multiplier,
    }


def constants(device: torch.device | str) -> torch.Tensor:
    """What kernels load instead of computing (see `load_keep_bits`): int32 ``[1]``."""
    return torch.tensor([labels.KEEP_BITS - (1 << WORD_BITS)], dtype=torch.int32, device=device)


@triton.jit
def load_keep_bits(constants_ptr):
    """The label mask as a ``[1, 1]`` tile; call it inside the loop.

    The masking instruction takes one immediate. A second constant is rebuilt by a move for every
    label (sm_90) or splits the instruction in two (sm_80); a loaded one stays in a register. It
    must be a tile: Triton decodes in the layout of the matrix operand only what follows from loaded
    tiles by elementwise operations, joins and reshapes. As a scalar argument it took 4.6 issue
    slots per 2-bit weight instead of 2.8.
    """
    zero = tl.arange(0, 1)
    return tl.load(constants_ptr + zero[:, None] + zero[None, :]).to(tl.uint32, bitcast=True)


@triton.jit
def funnel(before, newest, DISTANCE: tl.constexpr):
    """Bits ``DISTANCE .. DISTANCE + 31`` of the 64 bits ``before:newest``, counted from the end."""
    return (((before.to(tl.uint64) << 32) | newest.to(tl.uint64)) >> DISTANCE).to(tl.uint32)


@triton.jit
def groups_of_two(before, even, odd, STEP_BITS: tl.constexpr):
    """The groups of a run of two words and the word before them: two tuples, see `load_groups`."""
    if STEP_BITS == 4:
        return (even, odd), (before, even)
    else:
        # Four groups of two bytes, the halves of two words.
        return (even, even, odd, odd), (before, before, even, even)


@triton.jit
def groups_of_three(before, a, b, c):
    """As `groups_of_two`, of a run of three words: four groups of three bytes, which end 24, 48, 72
    and 96 bits into the run."""
    newest = (funnel(before, a, 8), funnel(a, b, 16), funnel(b, c, 24), c)
    return newest, (before >> 8, a >> 16, b >> 24, b)


@triton.jit
def _places(
    i, first_run, LAST_RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUTS: tl.constexpr, TILE_WORDS: tl.constexpr, RUN_WORDS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Where the words of (run, position) pairs begin: the row of their tile, and the run in it.

    Pairs go by four positions, then runs, then the other positions: the order of the lanes of a
    matrix operand. Position p is input p, or in SPREAD order ``p % 4 * BLOCK_K / 4 + p // 4``.
    """
    run = first_run + i // 4 % RUNS
    if LAST_RUN % RUNS != RUNS - 1:  # the last program has runs beyond the end: the last one again
        run = tl.minimum(run, LAST_RUN)
    row = i % 4 * (BLOCK_K // 4) + i // (4 * RUNS) if SPREAD else i % 4 + i // (4 * RUNS) * 4
    RUNS_OF_TILE: tl.constexpr = TILE_WORDS // RUN_WORDS
    place = run // RUNS_OF_TILE * (INPUTS * TILE_WORDS) + row * TILE_WORDS
    return place, run % RUNS_OF_TILE


@triton.jit
def load_groups(
    packed_ptr, first_run, first_row, LAST_RUN: tl.constexpr, RUNS: tl.constexpr,
    BLOCK_K: tl.constexpr, INPUTS: tl.constexpr, TILE_WORDS: tl.constexpr, STEP_BITS: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """The groups of RUNS runs and BLOCK_K inputs.

    A request of a warp covers eight runs and four inputs: whole sectors for every tile size. Runs
    of two words are read by 64 bits, which go through the first-level cache; there the words before
    them hit. (128-bit copies to shared memory pass it by, and the words before came a second time
    from the second level.) Runs of three words are read together with the word before them.

    Args:
        packed_ptr: the words of one expert, ``[tiles, INPUTS * TILE_WORDS]``.
        first_run: index of the first run along the outputs, a multiple of RUNS; runs beyond
            LAST_RUN are LAST_RUN again.
        first_row: index of the first input.
        SPREAD: order of the inputs, which is free within a turn if both factors agree: the quarter
            of them that a lane multiplies (every fourth position) are neighbours in memory, so a
            lane reads its part of ``x`` by one wide load.

    Returns:
        Two tuples of uint32 ``[RUNS, BLOCK_K]``, one entry per group of a run: the 32 bits that end
        with the group (or, of two groups in a word, with the second), and the bits before those, of
        which at least 8 are valid (a register needs 5; all 32 are where groups share a word).
    """
    RUN_WORDS: tl.constexpr = run_length(STEP_BITS) * STEP_BITS // 4
    PAIRS: tl.constexpr = RUNS * BLOCK_K
    packed_ptr += first_row * TILE_WORDS
    if RUN_WORDS == 2:
        i = tl.arange(0, 2 * PAIRS)
        place, run = _places(
            i // 2, first_run, LAST_RUN, RUNS, BLOCK_K, INPUTS, TILE_WORDS, RUN_WORDS, SPREAD
        )
        both = tl.load(packed_ptr + place + run * 2 + i % 2).to(tl.uint32, bitcast=True)
        both = tl.permute(tl.reshape(both, (BLOCK_K // 4, RUNS, 4, 2)), (1, 0, 2, 3))
        even, odd = tl.split(tl.reshape(both, (RUNS, BLOCK_K, 2)))
        place, run = _places(
            tl.arange(0, PAIRS), first_run, LAST_RUN, RUNS, BLOCK_K, INPUTS, TILE_WORDS, RUN_WORDS,
            SPREAD,
        )  # fmt: skip
        place += (run * 2 + TILE_WORDS - 1) % TILE_WORDS
        before = tl.load(packed_ptr + place).to(tl.uint32, bitcast=True)
        before = tl.permute(tl.reshape(before, (BLOCK_K // 4, RUNS, 4)), (1, 0, 2))
        before = tl.reshape(before, (RUNS, BLOCK_K))
        return groups_of_two(before, even, odd, STEP_BITS)
    else:  # Triton 3.6 compiles what follows a branch that returns, so this is one
        i = tl.arange(0, 4 * PAIRS)
        place, run = _places(
            i // 4, first_run, LAST_RUN, RUNS, BLOCK_K, INPUTS, TILE_WORDS, RUN_WORDS, SPREAD
        )
        place += (run * 3 + TILE_WORDS - 1 + i % 4) % TILE_WORDS
        four = tl.load(packed_ptr + place).to(tl.uint32, bitcast=True)
        four = tl.permute(tl.reshape(four, (BLOCK_K // 4, RUNS, 4, 2, 2)), (1, 0, 2, 4, 3))
        front, back = tl.split(tl.reshape(four, (RUNS, BLOCK_K, 2, 2)))
        before, a = tl.split(front)
        b, c = tl.split(back)
        return groups_of_three(before, a, b, c)


@triton.constexpr_function
def distance(group, step, step_bits):
    """Bits behind a step in the 32 bits that end with its group, or with the second of two."""
    behind = STEPS if step_bits == 2 and group % 2 == 0 else 0
    return (STEPS - 1 - step + behind) * step_bits


@triton.constexpr_function
def last_distance(step_bits):
    """The most of `distance`, behind the first step."""
    return distance(0, 0, step_bits)


@triton.jit
def product(
    before, newest, GROUP: tl.constexpr, STEP: tl.constexpr, STEP_BITS: tl.constexpr,
    LENGTH: tl.constexpr, MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """Register after step ``STEP`` (0 to 7) of group ``GROUP`` of a run, times the multiplier,
    modulo 2^32.

    Terms that two registers share are written twice and computed once.
    """
    # One constexpr assignment each: a constexpr cannot be assigned twice in Triton.
    OFFSET: tl.constexpr = steps_apart(STEP_BITS) * STEP_BITS
    PAIRED: tl.constexpr = LENGTH <= OFFSET
    LAST: tl.constexpr = last_distance(STEP_BITS)
    # Stream bits of the word, or of the group if it has its own, after this step.
    DISTANCE: tl.constexpr = distance(GROUP, STEP, STEP_BITS)
    IS_HIGH: tl.constexpr = PAIRED and DISTANCE >= OFFSET
    IS_LOW: tl.constexpr = PAIRED and DISTANCE + OFFSET <= LAST
    START: tl.constexpr = DISTANCE - OFFSET if IS_HIGH else DISTANCE
    MASK: tl.constexpr = (1 << LENGTH) - 1
    FIELDS: tl.constexpr = (MASK | (MASK << OFFSET)) if IS_HIGH or IS_LOW else MASK
    multiplier = tl.full((), MULTIPLIER, tl.uint32)
    bits = newest if START == 0 else funnel(before, newest, START)
    if FIELDS != 0xFFFFFFFF:
        bits = bits & FIELDS
    if IS_HIGH:
        return (bits >> OFFSET) * multiplier
    elif IS_LOW:
        REMOVE: tl.constexpr = (-(MULTIPLIER << OFFSET)) & 0xFFFFFFFF
        return bits * multiplier + (bits >> OFFSET) * tl.full((), REMOVE, tl.uint32)
    else:
        return bits * multiplier


@triton.constexpr_function
def step_at(turn, step_bits):
    """The step to decode at turn 0 to 7: steps that share a window directly after one another.

    In plain order the shared window would stay in a register for four turns; with 128 accumulators
    that spills.
    """
    apart = steps_apart(step_bits)
    if apart >= STEPS:
        return turn
    return turn // 2 + turn % 2 * apart if turn // 2 + apart < STEPS else turn - 3


@triton.jit
def halves(products, keep_bits):
    """The two bfloat16 numbers in a product, low half first."""
    masked = (products & keep_bits) ^ TOGGLE_BITS
    low = (masked & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (masked >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return low, high


@triton.jit
def label_weights(products, keep_bits, LABEL: tl.constexpr):
    """The bfloat16 weights that a label makes of products, a tuple in the order of outputs."""
    low, high = halves(products, keep_bits)
    if LABEL == "pair":
        return (low, high)
    else:
        tl.static_assert(LABEL == "half_sum")
        # Exact. Written in float32 because the interpreter would add the bit patterns.
        return ((low.to(tl.float32) + high.to(tl.float32)).to(tl.bfloat16),)


@triton.jit
def operand(products, keep_bits, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Products of all groups of a run, ``[ROWS / groups, BLOCK_K]`` each, as a matrix operand.

    The result is bfloat16 ``[ROWS, 2 * BLOCK_K]``: both halves of each product side by side, as
    they lie in its register, so nothing is moved to build the operand. The other operand,
    `paired_inputs`, does the rest of the label.

    Groups of a run lie eight rows apart, because lane ``l`` of the matrix instruction holds rows
    ``l // 4`` and ``l // 4 + 8``; the second two of four groups lie ROWS / 2 apart, in
    the next rows of the same warp if it has 32 of them. So a warp loads whole runs.
    """
    RUN: tl.constexpr = len(products)
    if RUN == 2:
        both = tl.join(_halves_tile(products[0], keep_bits), _halves_tile(products[1], keep_bits))
        both = tl.reshape(both, (ROWS // 16, 8, BLOCK_K, 2, 2))
        rows = tl.permute(both, (0, 4, 1, 2, 3))
    else:
        front = tl.join(_halves_tile(products[0], keep_bits), _halves_tile(products[1], keep_bits))
        back = tl.join(_halves_tile(products[2], keep_bits), _halves_tile(products[3], keep_bits))
        four = tl.reshape(tl.join(front, back), (ROWS // 32, 8, BLOCK_K, 2, 2, 2))
        rows = tl.permute(four, (5, 0, 4, 1, 2, 3))
    return tl.reshape(rows, (ROWS, 2 * BLOCK_K)).to(MATRIX_TYPE)


@triton.jit
def _halves_tile(products, keep_bits):
    low, high = halves(products, keep_bits)
    return tl.join(low, high)


@triton.jit
def paired_inputs(x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, LABEL: tl.constexpr):
    """Inputs ``[BLOCK_M, BLOCK_K]`` as the other factor of `operand`.

    The result is bfloat16 ``[2 * BLOCK_K, weights per step * BLOCK_M]``, inputs in SPREAD order.
    Each input twice lets the product sum the halves (``half_sum``). For ``pair``, each input before
    a zero takes the low half, in the first BLOCK_M columns, and after a zero the high half.
    """
    x = tl.permute(tl.reshape(x, (BLOCK_M, 4, BLOCK_K // 4)), (2, 1, 0))
    x = tl.reshape(x, (BLOCK_K, BLOCK_M))
    if LABEL == "half_sum":
        paired = tl.permute(tl.join(x, x), (0, 2, 1))
    else:
        tl.static_assert(LABEL == "pair")
        zero = tl.zeros_like(x)
        either = tl.join(tl.join(x, zero), tl.join(zero, x))  # [K, M, half, form]
        paired = tl.permute(either, (0, 2, 3, 1))
    COLUMNS: tl.constexpr = weights_per_step(LABEL) * BLOCK_M
    return tl.reshape(paired, (2 * BLOCK_K, COLUMNS)).to(MATRIX_TYPE)


@triton.constexpr_function
def turn_of(step, step_bits):
    """Inverse of `step_at`."""
    return [step_at(turn, step_bits) for turn in range(STEPS)].index(step)


@triton.jit
def outputs_of(
    sums, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, STEP_BITS: tl.constexpr, LABEL: tl.constexpr
):  # fmt: skip
    """Sums of the products of `operand` and `paired_inputs`, one of each turn, in order of outputs.

    Args:
        sums: eight float32 ``[ROWS, weights per step * BLOCK_M]``, by turn (`step_at`).

    Returns:
        float32 ``[BLOCK_M, ROWS * 8 * weights per step]``: consecutive outputs of each token.
    """
    PER_STEP: tl.constexpr = weights_per_step(LABEL)
    RUN: tl.constexpr = run_length(STEP_BITS)
    # Each join adds a bit of the step behind: the highest is joined first.
    even = tl.join(
        tl.join(sums[turn_of(0, STEP_BITS)], sums[turn_of(4, STEP_BITS)]),
        tl.join(sums[turn_of(2, STEP_BITS)], sums[turn_of(6, STEP_BITS)]),
    )
    odd = tl.join(
        tl.join(sums[turn_of(1, STEP_BITS)], sums[turn_of(5, STEP_BITS)]),
        tl.join(sums[turn_of(3, STEP_BITS)], sums[turn_of(7, STEP_BITS)]),
    )
    steps = tl.join(even, odd)
    if RUN == 2:
        steps = tl.reshape(steps, (ROWS // 16, 2, 8, PER_STEP, BLOCK_M, 8))
        steps = tl.permute(steps, (4, 0, 2, 1, 5, 3))
    else:
        steps = tl.reshape(steps, (2, ROWS // 32, 2, 8, PER_STEP, BLOCK_M, 8))
        steps = tl.permute(steps, (5, 1, 3, 0, 2, 6, 4))
    return tl.reshape(steps, (BLOCK_M, ROWS * 8 * PER_STEP))
