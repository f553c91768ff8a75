"""Results of the benchmark: one row per method and batch, ratios of the same rounds, and who is
wrong."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from erniequant.timing import quartiles, turn_ratios
from erniequant_kernels.bench.problem import BFLOAT16_BITS

TOLERANCE = 2**-6
"""Largest deviation from the float32 loop, relative to the largest output: two roundings each."""


@dataclass(frozen=True)
class Row:
    """One method on one batch.

    Attributes:
        bits: per stored weight; 16 for bfloat16.
        microseconds, low, high: time of a call: median and the range of eight tenths; None where it
            did not run.
        gigabytes_per_second: bytes that no method with these weights can avoid, over the median.
        memory_limit_percent: that, relative to the copy bandwidth of the card.
        error: largest deviation from the float32 loop, relative to the largest output.
        reason: why it did not run.
    """

    shape: str
    tokens: int
    method: str
    bits: int
    microseconds: float | None = None
    low: float | None = None
    high: float | None = None
    gigabytes_per_second: float | None = None
    memory_limit_percent: float | None = None
    error: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a packed method is as a rival: quartiles over rounds."""

    shape: str
    tokens: int
    method: str
    rival: str
    median: float
    low: float
    high: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def ratios(rows: Sequence[Row], seconds: Sequence[Sequence[float]]) -> list[Ratio]:
    """Every packed method against every rival of one batch.

    Args:
        seconds: of each row, round by round.
    """
    found = []
    for ours, times in zip(rows, seconds, strict=True):
        for rival, rival_times in zip(rows, seconds, strict=True):
            if ours.bits < BFLOAT16_BITS <= rival.bits:
                spread = quartiles(turn_ratios(rival_times, times))
                found.append(Ratio(
                    ours.shape, ours.tokens, ours.method, rival.method, spread.median, spread.low,
                    spread.high, len(times),
                ))  # fmt: skip
    return found


def against_the_fastest(rows: Sequence[Row], compared: Sequence[Ratio]) -> list[Ratio]:
    """Of the ratios of each packed method on each batch, the one with the rival that takes the
    least time."""
    times = {(r.shape, r.tokens, r.method): r.microseconds for r in rows}
    best: dict[tuple[str, int, str], tuple[float, Ratio]] = {}
    for ratio in compared:
        time = times[ratio.shape, ratio.tokens, ratio.rival]
        key = (ratio.shape, ratio.tokens, ratio.method)
        if time is not None and time < best.get(key, (float("inf"),))[0]:
            best[key] = (time, ratio)
    return [ratio for _, ratio in best.values()]


def wrong(rows: Sequence[Row]) -> list[str]:
    """Methods whose output is off by more than rounding, one line each."""
    return [
        f"{row.shape}, {row.tokens} tokens, {row.method}: off by {row.error:.4f} of the maximum"
        for row in rows
        if row.error is not None and not row.error <= TOLERANCE
    ]
