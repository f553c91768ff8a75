"""Measure every method on every batch, check what it computes, and say which one wins."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from erniequant.packing.products import experts_forward
from erniequant_kernels.bench.methods import Method, baselines, packed
from erniequant_kernels.bench.problem import (
    BFLOAT16_BITS,
    SHAPES,
    Batch,
    Experts,
    bytes_read,
    make_batch,
    make_experts,
)
from erniequant_kernels.bench.timing import Timer

TOLERANCE = 2**-6
"""Largest deviation from the float32 loop, relative to the largest output: two roundings each."""


# A card with less shared memory than a baseline's tiles take, a torch without a grouped product.
_NOT_HERE = (OutOfResources, RuntimeError, ValueError, TypeError, ImportError)


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


def reference(experts: Experts, batch: Batch) -> torch.Tensor:
    """The layer in float32, expert by expert."""
    weights = {"gate_up_proj": experts.gate_up_bf16, "down_proj": experts.down_bf16}
    return experts_forward(
        batch.x.float(), batch.expert_index, batch.routing, len(experts.down_bf16),
        lambda projection, expert: weights[projection][expert].float(), "silu",
    )  # fmt: skip


def _measure(
    method: Method, shape: str, bits: int, experts: Experts, batch: Batch, expected: torch.Tensor,
    timer: Timer, bandwidth: float,
) -> Row:  # fmt: skip
    row = Row(shape, len(batch.x), method.name, bits)
    try:
        run = method.prepare(experts, batch)
        deviation = (run().float() - expected).abs().max() / expected.abs().max()
        time = timer(run, method.capturable)
    except _NOT_HERE as error:
        # A baseline that this torch or this card does not have; ours must not fail quietly.
        if bits != BFLOAT16_BITS:
            raise
        return replace(row, reason=" ".join(str(error).split())[:120] or type(error).__name__)
    rate = bytes_read(SHAPES[shape], batch, bits) / time.median
    return replace(
        row, microseconds=1e6 * time.median, low=1e6 * time.low, high=1e6 * time.high,
        gigabytes_per_second=rate / 1e9, memory_limit_percent=100 * rate / bandwidth,
        error=float(deviation),
    )  # fmt: skip


@torch.no_grad()
def measure(
    shapes: Iterable[str], tokens: Sequence[int], bits: Sequence[int], device: torch.device,
    timer: Timer, bandwidth: float, rivals: bool = True,
) -> Iterator[Row]:  # fmt: skip
    """Rows for every shape, width and batch; bfloat16 is measured once per shape and batch.

    Args:
        rivals: whether to measure bfloat16 at all.
        bandwidth: bytes per second that count as the memory limit.
    """
    for shape in shapes:
        for index, width in enumerate(bits):
            experts = make_experts(SHAPES[shape], width, device)
            for count in tokens:
                batch = make_batch(SHAPES[shape], count, device)
                expected = reference(experts, batch)
                methods = [(packed(width), width)]
                if index == 0 and rivals:
                    methods += [(method, BFLOAT16_BITS) for method in baselines()]
                for method, stored in methods:
                    yield _measure(
                        method, shape, stored, experts, batch, expected, timer, bandwidth
                    )
            del experts


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
