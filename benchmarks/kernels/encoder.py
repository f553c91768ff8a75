"""Predicted rate of the Viterbi search on a card, from counted machine code and specified figures.

The model is that of the products (`benchmarks.kernels.placement`). A program alone waits for the
level-2 cache and a barrier in every forward step, and for the cache in every step of the trace
back. Feedback within a block, about a hundredth of the work, is left out.
"""

from collections.abc import Iterator
from functools import cache

from benchmarks.kernels.cards import CARDS, Card
from benchmarks.kernels.placement import ALONE, L2_LATENCY, L2_PORT, Work, makespan
from benchmarks.kernels.prediction import BARRIER
from erniequant.codes import ConvolutionalCode, get_code
from erniequant.codes.viterbi import SEAM_WEIGHTS
from erniequant_kernels.machine_code_cases import EXPERTS, INNER, TILE, viterbi_case
from erniequant_kernels.machine_traffic import Counted, count
from erniequant_kernels.ptx.accesses import EPILOGUE, LOOP, PROLOGUE
from erniequant_kernels.viterbi import forward_turns, scratch_elements

CODES = (("cc2", 12), ("cc2s", 12), ("cc3", 13), ("cc4", 13))
TILES = 2 * INNER // TILE
"""Of gate and up of an expert of the 21B."""
PROGRAMS = {
    "a tile of one expert": 1,
    "one expert": TILES,
    f"a tile of each of {EXPERTS} experts": EXPERTS,
    f"{EXPERTS} experts": EXPERTS * TILES,
}
"""Programs of a launch, by what they search."""


@cache
def _counted(code: ConvolutionalCode, arch: int) -> Counted:
    return count(viterbi_case(code), arch)


def rate(card: Card, code: ConvolutionalCode, programs: int) -> float:
    """Weights a second while so many tiles are searched at a time."""
    counts = _counted(code, card.arch)
    cost, loop = counts.cost, counts.sections[LOOP]
    turns, classes = forward_turns(code, TILE), code.states >> code.step_bits
    traced = (TILE + SEAM_WEIGHTS) // code.weights_per_step
    level1 = turns * loop.clocks
    level1 += sum(counts.sections[name].clocks for name in (PROLOGUE, EPILOGUE))
    # Costs are written in one step and read in the next.
    written = 4 * classes * turns
    waits = turns * (L2_LATENCY + BARRIER) + traced * L2_LATENCY
    work = Work(
        counts.warps,
        turns * cost.slots + counts.outside,
        max(level1, 2 * written / L2_PORT),
        waits + ALONE * (turns * cost.slots + counts.outside),
        0.0,
    )
    resident = card.resident(cost.registers, counts.warps, cost.shared_bytes)
    seconds = makespan(programs, card.multiprocessors, resident, work) / card.clock
    scratch = 4 * scratch_elements(code, TILE)[0] * programs
    if scratch > card.l2_bytes / 2:
        seconds = max(seconds, programs * written / card.bytes_per_second)
    return programs * TILE / seconds


def rate_rows() -> Iterator[str]:
    """Rows of predicted million weights a second."""
    yield f"| card | code | {' | '.join(PROGRAMS)} |"
    yield f"|---|---{'|---' * len(PROGRAMS)}|"
    for card in CARDS:
        for code in (get_code(*key) for key in CODES):
            cells = (f"{rate(card, code, number) / 1e6:.0f}" for number in PROGRAMS.values())
            name = f"{code.name}, L = {code.register_length}"
            yield f"| {card.name} | {name} | {' | '.join(cells)} |"
