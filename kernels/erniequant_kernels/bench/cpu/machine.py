"""The processor of a measurement: its facts, its cores, its memory."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import torch

from erniequant_kernels.bench.rounds import Call
from erniequant_kernels.cpu.machine import machine as target


def cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this process to its first ``threads`` cores, and torch to as many threads.

    Where the system cannot keep a process to some cores, only the threads are limited.
    """
    before, torch_threads = cores(), torch.get_num_threads()
    _keep_to(before[:threads])
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        _keep_to(before)


def _keep_to(numbers: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        # The process means its first thread only; threads begun earlier have their own.
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), numbers)


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, Any]:
    """Processor, threads, versions, and how busy the machine is before the measurement."""
    made_for = target()
    return {
        "processor": processor(),
        "threads": threads,
        "code_for": made_for.name,
        "lanes": made_for.lanes,
        "bfloat16_dot": made_for.bfloat16_dot,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "llvmlite": llvmlite.__version__,
        "python": sys.version.split()[0],
    }


def others_seconds() -> float:
    """Seconds that all cores have spent on other processes since the start of the system, and that
    a hypervisor kept from them; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, stat.read_text().split(maxsplit=9)[1:9])
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def wall_clock(call: Call) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
