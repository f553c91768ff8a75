"""Measure every method on every batch on the CPU, in rounds in which each has one turn.

Rounds in which other processes were at work do not count, unless there are too few others: threads
that wait for each other lose the most by them.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from erniequant.timing import triad, triad_bytes
from erniequant_kernels.bench.cpu.machine import others_seconds
from erniequant_kernels.bench.cpu.methods import CHECKED_EXPERTS, CpuMethod, methods, turned
from erniequant_kernels.bench.problem import SHAPES, Batch, Shape, make_batch
from erniequant_kernels.bench.rounds import Clock, one_round, summarize
from erniequant_kernels.bench.rows import Ratio, Row, ratios

TRIAD_NUMBERS = 2**25
"""float32 numbers of each of three vectors: 384 MiB together, more than caches hold."""

FEWEST_ROUNDS, ENOUGH_ROUNDS, MOST_ROUNDS = 5, 60, 600
"""Quiet rounds, at least and at most; rounds of any kind."""

ROUNDS_SECONDS = 15.0
"""No round begins later, once there are the fewest quiet ones."""

PATIENCE_SECONDS = 45.0
"""No round begins later, once there are the fewest of any kind."""

QUIET = 0.1
"""Cores that other processes use in a quiet round, at most."""


@dataclass(frozen=True)
class CpuRow(Row):
    """A `Row` whose memory limit is a triad's.

    Attributes:
        products_per_second: weights multiplied with a token, in billions; with one token, weights.
        other_cores: cores that other processes used meanwhile, on average.
    """

    products_per_second: float | None = None
    other_cores: float | None = None


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
    rounds, others_use = quiet(list(_rounds(every, batch, clock)))
    limit = triad_bytes(TRIAD_NUMBERS) / statistics.median(times.triad for times in rounds)
    seconds = [list(times) for times in zip(*(times.methods for times in rounds), strict=True)]
    rows = [
        replace(_row(name, shape, batch, method, times, limit), error=error, other_cores=others_use)
        for method, times, error in zip(every, seconds, errors, strict=True)
    ]
    return BatchResult(rows, ratios(rows, seconds), limit)


def _error(method: CpuMethod, batch: Batch) -> float:
    few = turned(batch, 0, CHECKED_EXPERTS)
    expected = method.expected(few)
    return float((method.run(few).float() - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Round:
    """Seconds of the triad and of every method in one round; cores that others used meanwhile."""

    triad: float
    methods: list[float]
    others: float


def quiet(rounds: list[Round]) -> tuple[list[Round], float]:
    """The quiet rounds, or all if these are too few; cores that others used in them."""
    undisturbed = [times for times in rounds if times.others <= QUIET]
    chosen = undisturbed if len(undisturbed) >= FEWEST_ROUNDS else rounds
    return chosen, statistics.mean(times.others for times in chosen)


def _rounds(every: Sequence[CpuMethod], batch: Batch, clock: Clock) -> Iterator[Round]:
    stream = triad(TRIAD_NUMBERS, batch.x.device)
    active = batch.active_experts
    for method in every:
        method.run(turned(batch, 0, method.experts))  # compiles what it needs
    undisturbed, spent = 0, 0.0
    for turn in range(MOST_ROUNDS):
        wanted = FEWEST_ROUNDS if spent > ROUNDS_SECONDS else ENOUGH_ROUNDS
        enough = undisturbed >= wanted
        if enough or (turn >= FEWEST_ROUNDS and spent > PATIENCE_SECONDS):
            return
        first = (turn + 1) * active
        calls = [partial(method.run, turned(batch, first, method.experts)) for method in every]
        before, begun = others_seconds(), time.perf_counter()
        triad_seconds = clock(stream)
        seconds = one_round(calls, turn, clock)
        wall = time.perf_counter() - begun
        found = Round(triad_seconds, seconds, max(others_seconds() - before, 0.0) / wall)
        undisturbed += found.others <= QUIET
        spent += sum(seconds)
        yield found


def _row(
    name: str, shape: Shape, batch: Batch, method: CpuMethod, seconds: list[float], limit: float
) -> CpuRow:
    times = summarize(seconds)
    rate = (batch.active_experts * method.expert_bytes + 2 * batch.x.nbytes) / times.median
    products = batch.expert_index.numel() * shape.weights_per_expert / times.median
    return CpuRow(
        name, len(batch.x), method.name, method.bits, 1e6 * times.median, 1e6 * times.low,
        1e6 * times.high, rate / 1e9, 100 * rate / limit, products_per_second=products / 1e9,
    )  # fmt: skip
