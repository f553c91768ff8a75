"""Measure every method on every batch, and check what it computes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

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
from erniequant_kernels.bench.rows import Row
from erniequant_kernels.bench.timing import Timer

# A card with less shared memory than a baseline's tiles take, a torch without a grouped product.
_NOT_HERE = (OutOfResources, RuntimeError, ValueError, TypeError, ImportError)


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
