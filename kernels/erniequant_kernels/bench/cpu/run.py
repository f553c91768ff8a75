"""Measure every method on every batch on the CPU, in rounds in which each has one turn.

Speeds of a shared or throttled machine change from second to second, for all methods alike: what is
compared are the times of one round.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from erniequant_kernels.bench.cpu.machine import triad
from erniequant_kernels.bench.cpu.methods import CHECKED_EXPERTS, CpuMethod, methods, turned
from erniequant_kernels.bench.problem import BFLOAT16_BITS, SHAPES, Batch, Shape, make_batch
from erniequant_kernels.bench.rows import Row
from erniequant_kernels.bench.timing import summarize

FEWEST_ROUNDS, MOST_ROUNDS = 5, 60
ROUNDS_SECONDS = 15.0
"""No round begins later, once there are the fewest."""

Clock = Callable[[Callable[[], object]], float]
"""Seconds of a call."""


@dataclass(frozen=True)
class CpuRow(Row):
    """A `Row` whose memory limit is a triad's.

    Attributes:
        products_per_second: weights multiplied with a token, in billions; with one token, weights.
    """

    products_per_second: float | None = None


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


@dataclass(frozen=True)
class BatchResult:
    """All that was measured on one batch.

    Attributes:
        triad: bytes per second.
    """

    rows: list[CpuRow]
    ratios: list[Ratio]
    triad: float


@torch.no_grad()
def measure(
    shapes: Iterable[str], tokens: Sequence[int], codes: Sequence[str], clock: Clock
) -> Iterator[BatchResult]:
    """Results for every shape and batch.

    codes: packed methods, each bits or ``wint2``.
    """
    for name in shapes:
        every = methods(SHAPES[name], list(codes))
        for count in tokens:
            if every:
                yield measure_batch(name, SHAPES[name], every, count, clock)


def measure_batch(
    name: str, shape: Shape, every: Sequence[CpuMethod], tokens: int, clock: Clock
) -> BatchResult:
    """Check each method, then time all in turns."""
    batch = make_batch(shape, tokens, torch.device("cpu"))
    errors = [_error(method, batch) for method in every]
    stream_bytes, stream = triad()
    seconds, stream_seconds = _rounds(every, batch, stream, clock)
    limit = stream_bytes / statistics.median(stream_seconds)
    rows = [
        _row(name, shape, batch, method, times, limit, error)
        for method, times, error in zip(every, seconds, errors, strict=True)
    ]
    return BatchResult(rows, list(_ratios(name, tokens, every, seconds)), limit)


def _error(method: CpuMethod, batch: Batch) -> float:
    few = turned(batch, 0, CHECKED_EXPERTS)
    expected = method.expected(few)
    return float((method.run(few).float() - expected).abs().max() / expected.abs().max())


def _rounds(
    every: Sequence[CpuMethod], batch: Batch, stream: Callable[[], object], clock: Clock
) -> tuple[list[list[float]], list[float]]:
    """Seconds of every method, and of the triad, by round."""
    active = batch.active_experts
    first = [0] * len(every)
    seconds: list[list[float]] = [[] for _ in every]
    stream_seconds: list[float] = []
    spent = 0.0
    while len(stream_seconds) < MOST_ROUNDS:
        turn = len(stream_seconds)
        if turn >= FEWEST_ROUNDS and spent > ROUNDS_SECONDS:
            break
        stream_seconds.append(clock(stream))
        # Nobody always has the same neighbour.
        order = [(turn + i) % len(every) for i in range(len(every))]
        for i in order:
            here = turned(batch, first[i], every[i].experts)
            if turn == 0:
                every[i].run(here)  # compiles what it needs
            first[i] += active
            seconds[i].append(clock(partial(every[i].run, here)))
        spent += sum(times[-1] for times in seconds)
    return seconds, stream_seconds


def _row(
    name: str, shape: Shape, batch: Batch, method: CpuMethod, seconds: list[float], limit: float,
    error: float,
) -> CpuRow:  # fmt: skip
    time = summarize(seconds)
    rate = (batch.active_experts * method.expert_bytes + 2 * batch.x.nbytes) / time.median
    products = batch.expert_index.numel() * shape.weights_per_expert / time.median
    return CpuRow(
        name, len(batch.x), method.name, method.bits, 1e6 * time.median, 1e6 * time.low,
        1e6 * time.high, rate / 1e9, 100 * rate / limit, error,
        products_per_second=products / 1e9,
    )  # fmt: skip


def _ratios(
    name: str, tokens: int, every: Sequence[CpuMethod], seconds: list[list[float]]
) -> Iterator[Ratio]:
    for ours, times in zip(every, seconds, strict=True):
        for rival, rival_times in zip(every, seconds, strict=True):
            if ours.bits < BFLOAT16_BITS <= rival.bits:
                low, median, high = quartiles(
                    [theirs / own for theirs, own in zip(rival_times, times, strict=True)]
                )
                yield Ratio(name, tokens, ours.name, rival.name, median, low, high, len(times))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of two values or more."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
