"""Time on a GPU: CUDA graphs and a cold level-2 cache."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from erniequant_kernels.bench.rounds import Call, Clock, summarize

WARM_UP = 3
ROUNDS = 30
FLUSH_CACHES = 8
"""Level-2 caches that are read between two calls. One would do; that eight take 130 us on an H100
also gives the host the time to launch what is measured before the card waits for it."""
LARGEST_CACHE = 128 * 2**20
"""Where torch does not tell the size of the cache: more than that of any card."""


@dataclass(frozen=True)
class Timer:
    """How methods are timed.

    Attributes:
        ready: gives the call that is timed, of a function and whether it may be captured in a CUDA
            graph; runs the function first, so that all it needs is compiled.
        clock: seconds of such a call with a cold cache.
    """

    ready: Callable[[Callable[[], torch.Tensor], bool], Call]
    clock: Clock


def captured(run: Callable[[], torch.Tensor], capturable: bool) -> Call:
    """The replay of a graph where possible, so launches cost all alike; else the function."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    if not capturable:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Call = graph.replay
    return replay


def cache_bytes() -> int:
    """Size of the level-2 cache of the card."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or LARGEST_CACHE


def cold_clock(flush: Callable[[], object]) -> Clock:
    """Time between events around a call, behind a flush of the level-2 cache."""

    def seconds(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return seconds


def reading(buffer: torch.Tensor) -> Callable[[], object]:
    """A flush that reads all of a buffer and writes one number.

    One that writes leaves the cache full of lines that the measured call first has to write back:
    up to 15 us within the 16 us of a layer at one token.
    """
    total = torch.empty((), dtype=buffer.dtype, device=buffer.device)
    return lambda: torch.sum(buffer, out=total, dim=())


def cuda_timer() -> Timer:
    """The timer of the card at hand."""
    numbers = FLUSH_CACHES * cache_bytes() // torch.float32.itemsize
    return Timer(captured, cold_clock(reading(torch.zeros(numbers, device="cuda"))))


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second of a large copy, read and write counted: the card's memory limit."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = timer.ready(lambda: target.copy_(source), False)
    return 2 * source.nbytes / summarize([timer.clock(copy) for _ in range(ROUNDS)]).median
