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
  constants.
* Registers of a group that lie 16 bits apart (15 for 3-bit steps) are cut out together. With ``v =
  low + (high << 16)`` and the multiplier ``m``, ``low * m = v * m - high * (m << 16)`` modulo 2^32:
  a multiplication in place of a shift and a mask, on the pipe that is idle.
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

    A group of 2-bit steps is no longer than that: its registers are cut out one by one.
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
def _funnel(before, newest, DISTANCE: tl.constexpr):
    """Bits ``DISTANCE .. DISTANCE + 31`` of the 64 bits ``before:newest``, counted from the end."""
    return (((before.to(tl.uint64) << 32) | newest.to(tl.uint64)) >> DISTANCE).to(tl.uint32)


@triton.jit
def load_groups(
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
    RUN_WORDS: tl.constexpr = run_length(STEP_BITS) * STEP_BITS // 4
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
        newest = (_funnel(before, a, 16), a, _funnel(a, b, 16), b)
        return newest, (before >> 16, before, a >> 16, a)
    else:  # Triton 3.6 compiles what follows a branch that returns, so this is one
        a = tl.load(words + first[:, None]).to(tl.uint32, bitcast=True)
        b = tl.load(words + (first + 1)[:, None]).to(tl.uint32, bitcast=True)
        c = tl.load(words + (first + 2)[:, None]).to(tl.uint32, bitcast=True)
        # Four groups of three bytes end 24, 48, 72 and 96 bits into the run.
        newest = (_funnel(before, a, 8), _funnel(a, b, 16), _funnel(b, c, 24), c)
        return newest, (before >> 8, a >> 16, b >> 24, b)


@triton.jit
def product(
    before, newest, STEP: tl.constexpr, STEP_BITS: tl.constexpr, LENGTH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """Register after step ``STEP`` (0 to 7) of a group, times the multiplier, modulo 2^32.

    Terms that two steps share are written twice and computed once.
    """
    # One constexpr assignment each: a constexpr cannot be assigned twice in Triton.
    OFFSET: tl.constexpr = steps_apart(STEP_BITS) * STEP_BITS
    PAIRED: tl.constexpr = LENGTH <= OFFSET
    DISTANCE: tl.constexpr = (7 - STEP) * STEP_BITS  # stream bits of the group after this step
    IS_HIGH: tl.constexpr = PAIRED and DISTANCE >= OFFSET
    IS_LOW: tl.constexpr = PAIRED and DISTANCE + OFFSET <= 7 * STEP_BITS
    START: tl.constexpr = DISTANCE - OFFSET if IS_HIGH else DISTANCE
    MASK: tl.constexpr = (1 << LENGTH) - 1
    FIELDS: tl.constexpr = (MASK | (MASK << OFFSET)) if IS_HIGH or IS_LOW else MASK
    multiplier = tl.full((), MULTIPLIER, tl.uint32)
    bits = newest if START == 0 else _funnel(before, newest, START)
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
    they lie in its register, so nothing is moved to build the operand. The other operand does the
    rest of the label: with each input twice the product sums the halves (``half_sum``), with zeros
    in between it takes one (``pair``); `erniequant_kernels.rotation` writes the inputs so.

    Groups of a run lie eight rows apart (`operand_group`), because lane ``l`` of the matrix
    instruction holds rows ``l // 4`` and ``l // 4 + 8``: it loads whole runs.
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
        rows = tl.permute(four, (0, 5, 4, 1, 2, 3))
    return tl.reshape(rows, (ROWS, 2 * BLOCK_K)).to(MATRIX_TYPE)


@triton.jit
def _halves_tile(products, keep_bits):
    low, high = halves(products, keep_bits)
    return tl.join(low, high)


@triton.jit
def operand_group(ROWS: tl.constexpr, RUN: tl.constexpr):
    """Which group, counted from the first of the tile, each row of `operand` holds: ``[ROWS]``."""
    row = tl.arange(0, ROWS)
    return row // (8 * RUN) * (8 * RUN) + row % 8 * RUN + row // 8 % RUN
