"""A model of one launch: equal programs on the multiprocessors of a card, as they finish and begin.

The multiprocessor with the most programs decides, so one is simulated: it holds as many programs as
its registers, shared memory and slots allow, and takes the next one when one ends. Warps go to the
scheduler with the fewest. A program waits for its first loads; then it works at a rate that

* its schedulers give: each issues one instruction a clock, shared by the warps that work on it, and
  a warp alone on a scheduler issues one every `ALONE` clocks at most;
* the pipes that all warps of a multiprocessor share (level 1, matrix units, the port to the level-2
  cache) give, each divided in proportion to what programs demand;
* the loads of its next turn allow, which were issued one or more turns before.
"""

import heapq
from dataclasses import dataclass

SCHEDULERS = 4
ALONE = 2.0
"""Clocks between instructions of a warp that has a scheduler to itself: an arithmetic result takes
4 to 6 clocks until it can be used, and decoding has two or three independent chains."""
L2_LATENCY = 270
"""Clocks until a load from the level-2 cache returns, in published micro-benchmarks of Ampere and
Hopper; Ada is of the same order."""
MEMORY_LATENCY = 700
"""Clocks until a load from memory returns while other programs load too; 480 to 600 without load in
published micro-benchmarks."""
L2_PORT = 64
"""Bytes that a multiprocessor and the level-2 cache exchange per clock."""


@dataclass(frozen=True)
class Work:
    """What one program takes, all in clocks.

    Attributes:
        warps: of the program.
        issue: of a scheduler, for one warp.
        shared: of the busiest pipe that the multiprocessor shares.
        least: that the program takes when it is alone, latencies included.
        wait: before it starts to work.
    """

    warps: int
    issue: float
    shared: float
    least: float
    wait: float


@dataclass
class _Program:
    schedulers: list[int]
    left: float = 1.0
    rate: float = 0.0


def makespan(programs: int, multiprocessors: int, resident: int, work: Work) -> float:
    """Clocks until the last of equal programs has ended.

    Args:
        resident: programs that a multiprocessor holds at once.
    """
    waiting = -(-programs // multiprocessors)
    occupied, busy = [0] * SCHEDULERS, [0] * SCHEDULERS
    now, number = 0.0, 0
    starting: list[tuple[float, int, _Program]] = []
    working: list[_Program] = []
    while waiting or starting or working:
        while waiting and len(starting) + len(working) < resident:
            mine = []
            for _ in range(work.warps):
                scheduler = occupied.index(min(occupied))
                occupied[scheduler] += 1
                mine.append(scheduler)
            heapq.heappush(starting, (now + work.wait, number, _Program(mine)))
            waiting, number = waiting - 1, number + 1
        _share(working, busy, work)
        ends = min((p.left / p.rate for p in working), default=float("inf"))
        until = min(now + ends, starting[0][0] if starting else float("inf"))
        for program in working:
            program.left -= (until - now) * program.rate
        now = until
        while starting and starting[0][0] <= now:
            program = heapq.heappop(starting)[2]
            working.append(program)
            for scheduler in program.schedulers:
                busy[scheduler] += 1
        for program in [p for p in working if p.left < 1e-9]:
            working.remove(program)
            for scheduler in program.schedulers:
                busy[scheduler] -= 1
                occupied[scheduler] -= 1
    return now


def _share(working: list[_Program], busy: list[int], work: Work) -> None:
    """Set the rate of each program, in programs per clock."""
    for program in working:
        crowd = max(max(busy[s] for s in program.schedulers), ALONE)
        program.rate = min(1 / max(work.issue * crowd, 1e-9), 1 / max(work.least, 1.0))
    total = sum(program.rate for program in working)
    if total * work.shared > 1:
        for program in working:
            program.rate /= total * work.shared


def ideal(programs: int, multiprocessors: int, work: Work) -> float:
    """Clocks if all work were spread evenly over all units without any waiting."""
    each = max(work.warps * work.issue / SCHEDULERS, work.shared)
    return programs * each / multiprocessors
