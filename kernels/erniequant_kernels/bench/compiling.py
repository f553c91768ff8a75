"""Compile what a function would launch, without launching it: for many at a time, on all cores.

Tensors may be on the device "meta", so the largest layer takes no memory. Triton keeps what it has
compiled on disk, where other processes find it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton

_collected = threading.local()


@contextmanager
def compiling_only() -> Iterator[None]:
    """Within it, launches of Triton kernels in this process compile and run nothing."""
    real = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        getattr(_collected, "kernels", []).append(kernel)
        return kernel

    triton.JITFunction.run = compile_only
    try:
        yield
    finally:
        triton.JITFunction.run = real


def compiled_by(run: Callable[[], object]) -> list[Any]:
    """The kernels that a function would launch, compiled, in order; within `compiling_only`, from
    any thread."""
    kernels: list[Any] = []
    _collected.kernels = kernels
    try:
        run()
    finally:
        del _collected.kernels
    return kernels


def spills(kernel: Any) -> int:
    """Registers that a compiled kernel spills, in 32-bit words; loads it onto the card.

    Raises:
        OutOfResources: the card has less shared memory than it takes.
    """
    assert kernel.run  # asking for it loads the kernel
    return int(kernel.n_spills)
