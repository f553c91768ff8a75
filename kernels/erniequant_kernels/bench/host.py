"""Time of a layer on the host: Triton compiles for a card, finds its kernels and launches them,
but on a driver that drops the launches, so no GPU is needed.

The driver's own part of a launch, and of real allocations, is left out.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from erniequant.errors import ErnieQuantError

WARP = 32
SHARED_BYTES = 232448
"""Of a program, on an H100."""


@dataclass(frozen=True)
class Launch:
    """A launch that reached the driver: name and address of the kernel, grid, arguments."""

    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


class _Utils:
    """The driver's side of compiled kernels: every one fits."""

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        return 0, 1, 255, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": WARP}

    def unload_module(self, *_: object) -> None:
        pass


@dataclass
class MockedDriver:
    """What Triton asks of a driver, and no device behind it.

    Attributes:
        launches: kept if `keeping`.
        compiled: name of each kernel that was compiled, or taken from Triton's cache on disk.
    """

    arch: int
    keeping: bool = False
    launches: list[Launch] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    utils: _Utils = field(default_factory=_Utils)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name = metadata.name
        self.compiled.append(name)
        self.functions.append(source.fn)

        def run(
            x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any
        ) -> None:
            if self.keeping:
                self.launches.append(Launch(name, (x, y, z), rest[3:]))

        return run

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        # Triton's caches go by device; this one is nobody else's.
        return -id(self)

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def forget(self) -> None:
        """Drop what was compiled. A real driver must not be asked to unload it."""
        for function in self.functions:
            cache, *_ = function.device_caches.pop(self.get_current_device(), ({},))
            for kernel in cache.values():
                kernel.module = None

    # Unequal to any other, also as part of a key.
    __hash__ = object.__hash__
    __eq__ = object.__eq__


@contextmanager
def mocked_driver(arch: int = 90) -> Iterator[MockedDriver]:
    """Let Triton compile for ``sm_<arch>`` and launch nothing, on tensors of the CPU.

    Raises:
        ErnieQuantError: Triton's interpreter is on, which compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise ErnieQuantError("the host's time needs Triton's compiler; unset TRITON_INTERPRET")
    before = driver._active
    mocked = MockedDriver(arch)
    driver.set_active(mocked)
    try:
        yield mocked
    finally:
        mocked.forget()
        driver._active = before


@dataclass(frozen=True)
class HostTime:
    """Seconds of one call on the host: the least and the median."""

    best: float
    median: float


def host_time(run: Callable[[], object], calls: int = 300) -> HostTime:
    """Time a function that only launches; the first calls compile and are not counted."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return HostTime(min(seconds), statistics.median(seconds))
