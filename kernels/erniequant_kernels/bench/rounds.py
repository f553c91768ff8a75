"""Rounds in which each method has one turn: whatever slows a machine slows all methods of a round,
so what is compared are the times of one round."""

import random
import statistics
from collections.abc import Callable, Sequence

from erniequant.timing import Spread

Call = Callable[[], object]
Clock = Callable[[Call], float]
"""Seconds of a call."""


def summarize(seconds: Sequence[float]) -> Spread:
    """Seconds of one call: median, and the range that holds eight tenths of the calls."""
    ordered = sorted(seconds)
    cut = len(ordered) // 10
    return Spread(statistics.median(ordered), ordered[cut], ordered[-1 - cut])


def order(methods: int, turn: int) -> list[int]:
    """Numbers of the methods in the order of a round. It is random: threads of a method wait awake
    for a while after its call and cost the next one time, so nobody always has the same before."""
    return random.Random(turn).sample(range(methods), methods)


def one_round(calls: Sequence[Call], turn: int, clock: Clock) -> list[float]:
    """Seconds of each call, in the order of `order`."""
    seconds = [0.0] * len(calls)
    for i in order(len(calls), turn):
        seconds[i] = clock(calls[i])
    return seconds


def rounds(calls: Sequence[Call], turns: int, clock: Clock) -> list[list[float]]:
    """Seconds of each call in each of so many rounds, a list for each call."""
    found = [one_round(calls, turn, clock) for turn in range(turns)]
    return [list(seconds) for seconds in zip(*found, strict=True)]
