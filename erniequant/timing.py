"""Times of calls that take turns: middles, spreads and ratios, and a call that shows how fast the
memory is."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Some values: their median, and two that hold the middle of them."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Spread:
    """Median with the lower and the upper quartile, of two values or more."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def extremes(values: Sequence[float]) -> Spread:
    """Median with the least and the largest value: for few values."""
    return Spread(statistics.median(values), min(values), max(values))


def turn_ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast ours is, turn by turn, from seconds: whatever slows a machine slows
    all calls of a turn.

    Raises:
        ValueError: one had more turns than the other.
    """
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def triad(numbers: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """``a = b + 3 c`` on vectors of so many float32 numbers, for the memory's limit."""
    a, b, c = (torch.ones(numbers, device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=3.0, out=a)


def triad_bytes(numbers: int) -> int:
    """Bytes that the triad reads and writes."""
    return 3 * torch.float32.itemsize * numbers
