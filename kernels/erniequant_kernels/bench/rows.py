"""Results of the benchmark: one row per method and batch, who wins, and who is wrong."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
class Verdict:
    """Ours against the fastest bfloat16 method on one batch; above 1 ours is faster."""

    shape: str
    tokens: int
    bits: int
    best_bf16: str
    speedup: float


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Speed-ups over the fastest bfloat16 method, batch by batch."""
    compared = []
    for row in rows:
        if row.bits == BFLOAT16_BITS or row.microseconds is None:
            continue
        rivals = [
            (rival.microseconds, rival.method)
            for rival in rows
            if (rival.shape, rival.tokens) == (row.shape, row.tokens)
            and rival.bits == BFLOAT16_BITS
            and rival.microseconds is not None
        ]
        if rivals:
            time, name = min(rivals)
            compared.append(Verdict(row.shape, row.tokens, row.bits, name, time / row.microseconds))
    return compared


def wrong(rows: Sequence[Row]) -> list[str]:
    """Methods whose output is off by more than rounding, one line each."""
    return [
        f"{row.shape}, {row.tokens} tokens, {row.method}: off by {row.error:.4f} of the maximum"
        for row in rows
        if row.error is not None and not row.error <= TOLERANCE
    ]
