"""Time of a layer on the host, and how often its kernels are compiled: Triton compiles for a card,
finds its kernels and launches them, but on a driver that drops the launches, so no GPU is needed.

Left out are the driver's own part of a launch and torch's operator around the layer.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from erniequant.errors import ErnieQuantError
from erniequant_kernels.bench.problem import Shape, random_matrices
from erniequant_kernels.moe import moe_experts
from erniequant_kernels.tuning import tables

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


@torch.inference_mode()
def layer(shape: Shape, bits: int, arch: int) -> Callable[[int], Callable[[], torch.Tensor]]:
    """By number of tokens, a function that launches a layer once; values are whatever memory holds,
    which nothing reads."""
    gate_up, down = (
        replace(
            matrix,
            packed=torch.empty(shape.experts, *matrix.packed.shape[1:], dtype=torch.int32),
            scale=torch.empty(shape.experts, *matrix.scale.shape[1:], dtype=torch.int16),
        )
        for matrix in random_matrices(shape, bits, 1, torch.device("cpu"))
    )
    tuning = tables()[f"sm_{arch}"]

    def of(tokens: int) -> Callable[[], torch.Tensor]:
        x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16)
        index = torch.empty(tokens, shape.top_k, dtype=torch.int64)
        routing = torch.empty(tokens, shape.top_k, dtype=torch.bfloat16)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            return moe_experts(x, index, routing, gate_up, down, tuning)

        return run

    return of


def variants(
    shape: Shape, bits: int, tokens: Iterable[int], arch: int = 90
) -> dict[tuple[str, Hashable], int]:
    """How many times Triton would compile each kernel for batches of so many tokens.

    Asks Triton itself, which finds the key of every launch and is then told not to compile.

    Returns:
        Counts by name of the kernel and, for one that takes sizes of a matrix, these sizes.
    """
    seen = defaultdict(set)

    def hook(**told: Any) -> bool:
        function, constants = told["fn"].jit_function, told["compile"]["constants"]
        named = {function.arg_names[at]: value for (at, *_), value in constants.items()}
        matrix = tuple((name, named[name]) for name in ("INPUTS", "OUTPUTS") if name in named)
        seen[told["fn"].name, matrix].add(told["key"])
        return True

    runtime = triton.knobs.runtime
    with mocked_driver(arch):
        before, runtime.jit_cache_hook = runtime.jit_cache_hook, hook
        try:
            make = layer(shape, bits, arch)
            for count in tokens:
                make(count)()
        finally:
            runtime.jit_cache_hook = before
    return {what: len(keys) for what, keys in seen.items()}
