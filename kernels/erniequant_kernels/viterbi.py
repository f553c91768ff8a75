# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""The Viterbi search of `erniequant.codes.viterbi` on a GPU: the same costs, the same ties.

A program owns one tile of outputs for a whole block of input rows, with the feedback between them.
Labels stay in registers. Costs of a step go to memory, which the trace back needs anyway, and the
next step reads them there: a barrier a step. Additions are fused where the CPU's compiler fuses
them (the forward steps) and nowhere else, so costs are equal to the last bit on processors that
have fused multiply-adds. Among equal costs the trace back takes the lowest register, as on the CPU.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from erniequant.codes.spec import ConvolutionalCode
from erniequant.codes.viterbi import SEAM_WEIGHTS
from erniequant_kernels.launch import kept_on_device, launch

UNREACHABLE = tl.constexpr(1e30)
LANE_LABELS = 64
"""Labels that a lane keeps in registers."""
MOST_SHARING = 4
"""Classes that a lane stores together."""
SEARCH_REGISTERS, OUTPUT_REGISTERS = 64, 4
"""Registers of a lane beside its labels, and for each output beyond two that it looks after between
searches. With 64 labels, four programs of four warps fit a multiprocessor. Left alone, the compiler
takes fewer registers and spills."""
KEPT_LABELS = 1 << 14
"""Labels that a program keeps, in a quarter of a multiprocessor's registers. More of them are read
in every step."""
MOST_WARPS = 16
SCRATCH_BYTES = 1 << 31
"""Costs that may lie in memory at a time; further matrices are searched in later launches."""


@triton.jit
def _step_values(target_ptr, root_ptr, t, PER_STEP: tl.constexpr):
    """Roots of the weights and negated targets of a step, two of each."""
    w0 = tl.load(root_ptr + t * PER_STEP)
    x0 = -tl.load(target_ptr + t * PER_STEP)
    w1, x1 = w0, x0
    if PER_STEP == 2:
        w1 = tl.load(root_ptr + t * PER_STEP + 1)
        x1 = -tl.load(target_ptr + t * PER_STEP + 1)
    return w0, x0, w1, x1


@triton.jit
def _labels(table_ptr, lane, p, j, CLASSES: tl.constexpr, BRANCHES: tl.constexpr,
            PER_STEP: tl.constexpr, SHARING: tl.constexpr):  # fmt: skip
    """Labels of branch ``j`` to class ``p`` of each lane, by weight."""
    found = ()
    for v in tl.static_range(PER_STEP):
        row = table_ptr + (v * BRANCHES + j) * CLASSES
        found += (tl.load(row + lane * SHARING + p),)
    return found


@triton.jit
def _store_neighbours(at, values, COUNT: tl.constexpr):
    """Store one, two or four numbers side by side."""
    if COUNT == 1:
        tl.store(at, values[0])
    else:
        both = tl.join(values[0], values[COUNT // 2])
        if COUNT == 4:
            both = tl.reshape(tl.join(both, tl.join(values[1], values[3])), (at.shape[0], 4))
        tl.store(at[:, None] + tl.arange(0, COUNT)[None, :], both)


@triton.jit
def _forward(
    before_ptr, after_ptr, table_ptr, kept, values, lane, CLASSES: tl.constexpr,
    BRANCHES: tl.constexpr, PER_STEP: tl.constexpr, SHARING: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One step: ``after[r] = min_j before[class of j, r] + |label[j, r] root - x|^2``."""
    w0, x0, w1, x1 = values
    before = ()
    for j in tl.static_range(BRANCHES):
        place = j * (CLASSES // BRANCHES) + lane * SHARING // BRANCHES
        before += (tl.load(before_ptr + place),)
    found = ()
    for p in tl.static_range(SHARING):
        least = tl.full(lane.shape, float("inf"), tl.float32)
        for j in tl.static_range(BRANCHES):
            labels = kept
            if not KEPT:
                labels = _labels(table_ptr, lane, p, j, CLASSES, BRANCHES, PER_STEP, SHARING)
            d = tl.fma(labels[(p * BRANCHES + j) * KEPT * PER_STEP], w0, x0)
            cost = tl.fma(d, d, before[j])
            if PER_STEP == 2:
                d = tl.fma(labels[(p * BRANCHES + j) * KEPT * PER_STEP + 1], w1, x1)
                cost = tl.fma(d, d, cost)
            least = tl.minimum(least, cost)
        found += (least,)
    _store_neighbours(after_ptr + lane * SHARING, found, SHARING)


@triton.jit
def _trace_back(
    target_ptr, root_ptr, table_ptr, cost_ptr, state_ptr, first, steps, stop, r,
    STEPS: tl.constexpr, CLASSES: tl.constexpr, STEP_BITS: tl.constexpr, PER_STEP: tl.constexpr,
):  # fmt: skip
    """As its namesake on the CPU: fills states from ``stop`` on, returns the class before them."""
    BRANCHES: tl.constexpr = 1 << STEP_BITS
    branch = tl.arange(0, BRANCHES)
    for back in range(steps - stop):
        i = steps - 1 - back
        w0, x0, w1, x1 = _step_values(target_ptr, root_ptr, (first + i) % STEPS, PER_STEP)
        s = branch * CLASSES + r
        cost = tl.load(cost_ptr + i * CLASSES + (s >> STEP_BITS))
        d = tl.load(table_ptr + s) * w0 + x0
        cost += d * d
        if PER_STEP == 2:
            d = tl.load(table_ptr + BRANCHES * CLASSES + s) * w1 + x1
            cost += d * d
        # NaN is not below infinity: where no cost is, the first branch stays.
        cost = tl.where(cost < float("inf"), cost, float("inf"))
        state = tl.argmin(cost, axis=0) * CLASSES + r
        tl.store(state_ptr + i, state)
        r = state >> STEP_BITS
    return r


@triton.jit(do_not_specialize=["rows"])
def viterbi_kernel(
    aims_ptr, feedback_ptr, scale_ptr, root_ptr, table_ptr, error_ptr, labels_ptr, words_ptr,
    target_ptr, cost_ptr, state_ptr, rows,
    TILE: tl.constexpr, CLASSES: tl.constexpr, STEP_BITS: tl.constexpr, PER_STEP: tl.constexpr,
    AROUND: tl.constexpr, SHARING: tl.constexpr, KEPT: tl.constexpr, OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr, WORD_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (tile, matrix) encodes a tile of all rows, the last one first.

    A lane computes SHARING neighbouring classes, which have their predecessors in common.
    """
    BRANCHES: tl.constexpr = 1 << STEP_BITS
    STEPS: tl.constexpr = TILE // PER_STEP
    LONGEST: tl.constexpr = max(STEPS, 2 * AROUND)
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    matrix = tl.program_id(1).to(tl.int64)
    program = matrix * tiles + tile
    n = tl.arange(0, OUTPUTS)
    inside = n < TILE
    aims_ptr += matrix * rows * tiles * TILE + tile * TILE
    error_ptr += matrix * rows * tiles * TILE + tile * TILE
    labels_ptr += matrix * rows * tiles * TILE + tile * TILE
    words_ptr += (matrix * rows * tiles + tile) * WORDS
    feedback_ptr += matrix * rows * rows
    root_ptr += program * TILE
    target_ptr += program * TILE
    cost_ptr += program * ((LONGEST + 1) * CLASSES)
    state_ptr += program * LONGEST
    scale_ptr += program * TILE
    lane = tl.arange(0, CLASSES // SHARING)
    kept = ()
    if KEPT:
        for p in tl.static_range(SHARING):
            for j in tl.static_range(BRANCHES):
                kept += _labels(table_ptr, lane, p, j, CLASSES, BRANCHES, PER_STEP, SHARING)
    for done in range(rows):
        k = rows - 1 - done
        aim = tl.load(aims_ptr + k * tiles * TILE + n, mask=inside, other=0)
        for later in range(k + 1, rows):
            error = tl.load(error_ptr + later * tiles * TILE + n, mask=inside, other=0)
            aim += tl.load(feedback_ptr + later * rows + k) * error
        tl.store(aims_ptr + k * tiles * TILE + n, aim, mask=inside)
        scale = tl.load(scale_ptr + n, mask=inside, other=1)
        root = tl.load(root_ptr + n, mask=inside, other=0)
        tl.store(target_ptr + n, tl.div_rn(aim, scale) * root, mask=inside)
        seam = tl.full((), 0, tl.int32)
        for search in range(2):
            # First around the seam with free ends, then the whole sequence, tied to what came out.
            free = search == 0
            first = tl.where(free, STEPS - AROUND % STEPS, 0)
            steps = tl.where(free, 2 * AROUND, STEPS)
            stop = tl.where(free, AROUND, 0)
            for p in tl.static_range(SHARING):
                begun = tl.where(free | (lane * SHARING + p == seam), 0.0, UNREACHABLE)
                tl.store(cost_ptr + lane * SHARING + p, begun)
            for i in range(steps):
                tl.debug_barrier()
                values = _step_values(target_ptr, root_ptr, (first + i) % STEPS, PER_STEP)
                _forward(
                    cost_ptr + i * CLASSES, cost_ptr + (i + 1) * CLASSES, table_ptr, kept, values,
                    lane, CLASSES, BRANCHES, PER_STEP, SHARING, KEPT,
                )  # fmt: skip
            tl.debug_barrier()
            r = seam
            if free:
                last = tl.load(cost_ptr + steps * CLASSES + tl.arange(0, CLASSES))
                r = tl.argmin(last, axis=0)
            seam = _trace_back(
                target_ptr, root_ptr, table_ptr, cost_ptr, state_ptr, first, steps, stop, r,
                STEPS, CLASSES, STEP_BITS, PER_STEP,
            )  # fmt: skip
            tl.debug_barrier()
        register = tl.load(state_ptr + n // PER_STEP, mask=inside, other=0)
        label = tl.load(table_ptr + n % PER_STEP * (BRANCHES * CLASSES) + register)
        place = k * tiles * TILE + n
        tl.store(labels_ptr + place, label, mask=inside)
        error = tl.load(error_ptr + place, mask=inside, other=0)
        scale = tl.load(scale_ptr + n, mask=inside, other=1)
        tl.store(error_ptr + place, error - label * scale, mask=inside)
        word = tl.arange(0, WORD_ROWS)
        bits = tl.zeros((WORD_ROWS,), tl.int32)
        for bit in range(32):
            at = word * 32 + bit
            state = tl.load(state_ptr + at // STEP_BITS, mask=word < WORDS, other=0)
            bits = bits << 1 | (state >> (STEP_BITS - 1 - at % STEP_BITS) & 1)
        tl.store(words_ptr + k * tiles * WORDS + word, bits, mask=word < WORDS)
        tl.debug_barrier()


def search_constants(code: ConvolutionalCode, tile: int) -> dict[str, Any]:
    """Constexpr arguments of the kernel, ``num_warps`` and ``maxnreg``."""
    branches, per_step = 1 << code.step_bits, code.weights_per_step
    classes = code.states // branches
    sharing = max(1, min(branches, MOST_SHARING, LANE_LABELS // (branches * per_step)))
    warps = min(MOST_WARPS, max(1, classes // sharing // 32))
    outputs = triton.next_power_of_2(tile)
    labels = max(sharing * branches, code.states // (32 * warps)) * per_step
    registers = SEARCH_REGISTERS + min(labels, LANE_LABELS)
    registers += OUTPUT_REGISTERS * max(0, outputs // (32 * warps) - 2)
    words = code.words_per_sequence(tile)
    return {
        "TILE": tile,
        "CLASSES": classes,
        "STEP_BITS": code.step_bits,
        "PER_STEP": per_step,
        "AROUND": SEAM_WEIGHTS // per_step,
        "SHARING": sharing,
        "KEPT": code.states * per_step <= KEPT_LABELS,
        "OUTPUTS": outputs,
        "WORDS": words,
        "WORD_ROWS": triton.next_power_of_2(words),
        "num_warps": warps,
        "maxnreg": registers,
    }


def forward_turns(code: ConvolutionalCode, tile: int) -> int:
    """Forward steps that the search of one row of a tile takes."""
    return (tile + 2 * SEAM_WEIGHTS) // code.weights_per_step


def scratch_elements(code: ConvolutionalCode, tile: int) -> tuple[int, int]:
    """Costs and states that a program writes down."""
    longest = max(tile, 2 * SEAM_WEIGHTS) // code.weights_per_step
    return (longest + 1) * (code.states >> code.step_bits), longest


@kept_on_device
def _table(code: ConvolutionalCode, device: torch.device) -> torch.Tensor:
    """Labels float32 ``[V, 2**L]``."""
    return torch.from_numpy(np.ascontiguousarray(code.table().T)).to(device)


def search_rows(
    aims: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor,
    error: torch.Tensor, code: ConvolutionalCode,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`erniequant.codes.viterbi.Encoder.encode_rows` of ``M`` matrices, on the current device.

    Args:
        aims: float32 ``[M, R, N]``; rows become what they aimed at, with their feedback.
        feedback: float32 ``[M, R, R]``, whose column ``r`` below the diagonal multiplies errors.
        scale: float32 ``[M, N]``, positive: weight = ``scale`` * label.
        weights: float32 ``[M, N / T, T]``, positive: how much squared errors count.
        error: float32 ``[M, R, N]``: on entry the weights, on return these minus their codes.
        code: without runs. All tensors are contiguous.

    Returns:
        int32 words ``[M, R, N / T, T * bits / 32]`` and float32 labels ``[M, R, N]``. Aims that are
        not finite spoil the labels of their tile, in their row and those above, and nothing else.
    """
    matrices, tiles, tile = weights.shape
    rows, device = aims.shape[1], aims.device
    words = torch.empty(
        (matrices, rows, tiles, code.words_per_sequence(tile)), dtype=torch.int32, device=device
    )
    labels = torch.empty_like(aims)
    costs, states = scratch_elements(code, tile)
    at_once = max(1, SCRATCH_BYTES // (4 * costs * tiles))
    programs = min(matrices, at_once) * tiles
    target = torch.empty(programs * tile, device=device)
    cost = torch.empty(programs * costs, device=device)
    state = torch.empty(programs * states, dtype=torch.int32, device=device)
    root, constants = weights.sqrt(), search_constants(code, tile)
    for first in range(0, matrices, at_once):
        aim, own, size, importance, missed, found, packed = (
            tensor[first : first + at_once]
            for tensor in (aims, feedback, scale, root, error, labels, words)
        )
        launch(
            viterbi_kernel, (tiles, len(aim)),
            aim, own, size, importance, _table(code, device), missed, found, packed,
            target, cost, state, rows,
            num_stages=1, enable_fp_fusion=False, **constants,
        )  # fmt: skip
    return words, labels


def search_rows_reference(
    aims: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor,
    error: torch.Tensor, code: ConvolutionalCode,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`search_rows` in plain torch, equal to the last bit where sums are fused."""
    matrices, tiles, tile = weights.shape
    table = torch.from_numpy(code.table()).to(aims.device)
    labels = torch.empty_like(aims)
    root, symbols = weights.sqrt().view(-1, tile), []
    for k in reversed(range(aims.shape[1])):
        for later in range(k + 1, aims.shape[1]):
            aims[:, k] += feedback[:, later, k, None] * error[:, later]
        targets = (aims[:, k] / scale).view(-1, tile) * root
        states = _search_reference(targets, root, table, code)
        labels[:, k] = table[states].view(matrices, -1)
        error[:, k] -= labels[:, k] * scale
        symbols.append(states & ((1 << code.step_bits) - 1))
    ages = torch.arange(code.step_bits - 1, -1, -1, device=aims.device)
    bits = torch.stack(symbols[::-1], 1)[..., None] >> ages & 1
    by_word = bits.reshape(matrices, tiles, aims.shape[1], -1, 32).transpose(1, 2)
    words = (by_word << torch.arange(31, -1, -1, device=aims.device)).sum(-1)
    return words.int(), labels


def _search_reference(
    x: torch.Tensor, root: torch.Tensor, table: torch.Tensor, code: ConvolutionalCode
) -> torch.Tensor:
    """Registers int64 ``[S, T / V]`` of the sequences ``x`` ``[S, T]``, which are multiplied with
    the roots of their weights."""
    per_step, branches = code.weights_per_step, 1 << code.step_bits
    classes, steps = code.states // branches, x.shape[1] // per_step
    x, root = (values.view(-1, steps, per_step).double() for values in (x, root))
    around = SEAM_WEIGHTS // per_step
    begun = torch.zeros(len(x), classes, device=x.device)
    order = [(i - around) % steps for i in range(2 * around)]
    costs = _forward_reference(x[:, order], root[:, order], begun, table, code)
    seam = _trace_reference(x[:, order], root[:, order], costs, costs[-1].argmin(1), table, code)
    seam = seam[:, around] >> code.step_bits
    begun.fill_(UNREACHABLE.value).scatter_(1, seam[:, None], 0)
    costs = _forward_reference(x, root, begun, table, code)
    return _trace_reference(x, root, costs, seam, table, code)


def _forward_reference(
    x: torch.Tensor, root: torch.Tensor, begun: torch.Tensor, table: torch.Tensor,
    code: ConvolutionalCode,
) -> list[torch.Tensor]:  # fmt: skip
    """Costs ``[S, classes]`` of the cheapest paths, from ``begun`` on: one more than steps."""
    costs = [begun]
    for t in range(x.shape[1]):
        reached = costs[-1].repeat_interleave(1 << code.step_bits, 1).double()
        for v in range(code.weights_per_step):
            # Products of float32 are exact in float64, so each of these is a fused multiply-add.
            d = (table[:, v].double() * root[:, t, v, None] - x[:, t, v, None]).float().double()
            reached = (d * d + reached).float().double()
        costs.append(reached.float().view(len(x), 1 << code.step_bits, -1).amin(1))
    return costs


def _trace_reference(
    x: torch.Tensor, root: torch.Tensor, costs: list[torch.Tensor], r: torch.Tensor,
    table: torch.Tensor, code: ConvolutionalCode,
) -> torch.Tensor:  # fmt: skip
    """Registers ``[S, steps]`` of the cheapest path to class ``r`` ``[S]``: of equal ones, the
    lowest."""
    branches = torch.arange(1 << code.step_bits, device=x.device)
    branch = branches * (code.states >> code.step_bits)
    states = []
    for t in reversed(range(x.shape[1])):
        s = branch + r[:, None]
        cost = costs[t].gather(1, s >> code.step_bits)
        for v in range(code.weights_per_step):
            d = table[s, v] * root[:, t, v, None].float() - x[:, t, v, None].float()
            cost = cost + d * d
        lowest = torch.where(cost < torch.inf, cost, torch.inf).argmin(1, keepdim=True)
        states.append(s.gather(1, lowest)[:, 0])
        r = states[-1] >> code.step_bits
    return torch.stack(states[::-1], 1)
