"""Measure every method on every batch, in rounds in which each has one turn, and check what it
computes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from triton.runtime.errors import OutOfResources

from erniequant.packing.products import experts_forward
from erniequant_kernels.bench.methods import Method, methods
from erniequant_kernels.bench.problem import (
    BFLOAT16_BITS,
    SHAPES,
    Batch,
    bytes_read,
    make_batch,
)
from erniequant_kernels.bench.rounds import Call, rounds, summarize
from erniequant_kernels.bench.rows import Ratio, Row, ratios
from erniequant_kernels.bench.timing import ROUNDS, Timer

# A card with less shared memory than a baseline's tiles take, a torch without a grouped product.
_NOT_HERE = (OutOfResources, RuntimeError, ValueError, TypeError, ImportError)


@dataclass(frozen=True)
class BatchResult:
    """All that was measured on one batch; ratios are of the methods that ran."""

    rows: list[Row]
    ratios: list[Ratio]


@torch.no_grad()
def measure(
    shapes: Iterable[str], tokens: Sequence[int], codes: Sequence[int | str], device: torch.device,
    timer: Timer, bandwidth: float,
) -> Iterator[BatchResult]:  # fmt: skip
    """Results for every shape and batch.

    Args:
        codes: of the packed methods, widths or ``wint2``.
        bandwidth: bytes per second that count as the memory limit.
    """
    for shape in shapes:
        every = methods(SHAPES[shape], codes, device)
        for count in tokens if every else ():
            yield measure_batch(shape, every, count, device, timer, bandwidth)
        del every


def measure_batch(
    shape: str, every: Sequence[Method], tokens: int, device: torch.device, timer: Timer,
    bandwidth: float,
) -> BatchResult:  # fmt: skip
    """Check each method, then time all that run in turns."""
    batch = make_batch(SHAPES[shape], tokens, device)
    rows, calls = zip(*_prepared(shape, every, batch, timer), strict=True)
    running = [i for i, call in enumerate(calls) if call is not None]
    seconds = rounds([calls[i] for i in running], ROUNDS, timer.clock)
    found = list(rows)
    for i, times in zip(running, seconds, strict=True):
        found[i] = _with_times(found[i], every[i], batch, times, bandwidth)
    return BatchResult(found, ratios([found[i] for i in running], seconds))


def _prepared(
    shape: str, every: Sequence[Method], batch: Batch, timer: Timer
) -> Iterator[tuple[Row, Call | None]]:
    """Rows without times, and the calls to time; None where a method does not run here."""
    expected: dict[int | str, torch.Tensor] = {}
    for method in every:
        row = Row(shape, len(batch.x), method.name, method.bits)
        # All bfloat16 methods have the same weights.
        weights = method.bits if method.bits == BFLOAT16_BITS else method.name
        if weights not in expected:
            expected[weights] = reference(method, SHAPES[shape].experts, batch)
        target = expected[weights]
        try:
            run = method.prepare(batch)
            deviation = (run().float() - target).abs().max() / target.abs().max()
            call = timer.ready(run, method.capturable)
        except _NOT_HERE as error:
            # A baseline that this torch or this card does not have; ours must not fail quietly.
            if method.bits != BFLOAT16_BITS:
                raise
            yield replace(row, reason=_one_line(error)), None
        else:
            yield replace(row, error=float(deviation)), call


def reference(method: Method, experts: int, batch: Batch) -> torch.Tensor:
    """The layer in float32, expert by expert."""
    return experts_forward(
        batch.x.float(), batch.expert_index, batch.routing, experts, method.weight, "silu"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _with_times(
    row: Row, method: Method, batch: Batch, seconds: Sequence[float], bandwidth: float
) -> Row:
    time = summarize(seconds)
    read = bytes_read(SHAPES[row.shape], batch, row.bits, method.expert_bytes)
    rate = read / time.median
    return replace(
        row, microseconds=1e6 * time.median, low=1e6 * time.low, high=1e6 * time.high,
        gigabytes_per_second=rate / 1e9, memory_limit_percent=100 * rate / bandwidth,
    )  # fmt: skip
