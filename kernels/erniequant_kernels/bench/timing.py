"""Time on a GPU: CUDA graphs, a cold level-2 cache, medians."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 3
REPETITIONS = 30
FLUSH_BYTES = 256 * 2**20
"""More than any level-2 cache: between layers of a real model nothing of this one stays."""


@dataclass(frozen=True)
class Time:
    """Seconds of one call: median, and the range that holds eight tenths of the calls."""

    median: float
    low: float
    high: float


Timer = Callable[[Callable[[], torch.Tensor], bool], Time]
"""Takes the function to time, and whether it may be captured in a CUDA graph."""


def summarize(seconds: list[float]) -> Time:
    """Median and spread of single calls."""
    ordered = sorted(seconds)
    cut = len(ordered) // 10
    return Time(statistics.median(ordered), ordered[cut], ordered[-1 - cut])


def cuda_timer(run: Callable[[], torch.Tensor], capturable: bool) -> Time:
    """Time between events around each call; a graph where possible, so launches cost all alike."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    call: Callable[[], object] = run
    if capturable:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        call = graph.replay
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(REPETITIONS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return summarize(seconds)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and write counted: the card's memory limit."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / cuda_timer(lambda: target.copy_(source), False).median
