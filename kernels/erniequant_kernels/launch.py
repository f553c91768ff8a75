"""Launches of Triton kernels: one way to make them, and a list of them that can be made again.

Triton looks at every argument of every launch to find its compiled kernel: 8 to 10 microseconds on
the host, five times a layer, where the kernels of one token take about as long. What it finds
follows from the sizes of a batch, so `repeated` keeps the launches of a computation. The next time
it allocates one block of memory, puts the new addresses in, and calls the compiled kernels.
"""

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from erniequant.errors import ErnieQuantError
from erniequant_kernels import dependent

ALIGNMENT = 256
"""Bytes at which pieces of the workspace begin."""

MOST_KEPT = 4096
"""Computations whose launches are kept, some KB each: prompts have any length. Older ones go."""

_INTERPRETED = bool(triton.knobs.runtime.interpret)

_SPECIALIZED = 16
"""Triton compiles a kernel again where the address of an argument is no multiple of this."""


@dataclass(frozen=True)
class _Step:
    """A launch: what never changes of its arguments, and (position, tensor, offset) of pointers."""

    kernel: Any
    grid: tuple[int, int, int]
    template: list[Any]
    pointers: tuple[tuple[int, int, int], ...]


@dataclass
class _Recording:
    """Launches of a computation as it runs for the first time.

    Attributes:
        tensors: what it was given.
        pieces: its workspace so far.
        steps: None once something could not be kept.
    """

    tensors: Sequence[torch.Tensor]
    pieces: list[torch.Tensor] = field(default_factory=list)
    steps: list[_Step] | None = field(default_factory=list)

    def add(self, kernel: Any, compiled: Any, grid: Sequence[int], args: Sequence[Any]) -> None:
        """Keep a launch that has been made."""
        if self.steps is None:
            return
        template, pointers = list(args), []
        for at, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                place = self._place(arg)
                if place is None:
                    self.steps = None
                    return
                template[at] = place[1]
                if place[0] >= 0:
                    pointers.append((at, *place))
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(_Step(compiled, (x, y, z), template, tuple(pointers)))

    def _place(self, arg: torch.Tensor) -> tuple[int, int] | None:
        """Which tensor an argument lies in and where, -1 and the address if it never moves; None if
        that is unknown or ambiguous, as where two tensors share memory."""
        address = arg.data_ptr()
        if any(address == kept.data_ptr() for kept in _kept):
            return -1, address
        inside = [
            (slot, address - tensor.data_ptr())
            for slot, tensor in enumerate(self.tensors)
            if 0 <= address - tensor.data_ptr() < tensor.nbytes
        ]
        offset = 0
        for piece in self.pieces:
            if 0 <= address - piece.data_ptr() < piece.nbytes:
                inside.append((len(self.tensors), offset + address - piece.data_ptr()))
            offset += _rounded(piece.nbytes)
        return inside[0] if len(inside) == 1 else None


@dataclass(frozen=True)
class _Launches:
    """What `repeated` keeps of a computation."""

    steps: list[_Step]
    workspace_bytes: int


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_rehearsal: ContextVar[bool | None] = ContextVar("rehearsal", default=None)
"""Whether compiled kernels are loaded as well; None while launches are meant."""
_launches: dict[Hashable, _Launches] = {}
_keeping = threading.Lock()
_kept: list[torch.Tensor] = []


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def launch(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, on the current stream of the current device.

    Args:
        args: the kernel's first arguments: tensors and integers.
        constants: constexpr arguments, ``num_warps`` and other options. ``enable_fp_fusion``, by
            which ``a * b + c`` is rounded once, is True unless given: versions of Triton differ in
            what they do where nothing is said.

    Raises:
        ErnieQuantError: a CUDA graph is being captured, and the kernel is not compiled.
    """
    constants = {"enable_fp_fusion": True, **constants}
    if dependent.ARGUMENT in getattr(kernel, "arg_names", ()) and isinstance(kernel, JITFunction):
        constants[dependent.ARGUMENT] = constants["launch_pdl"] = dependent.supported()
    loads = _rehearsal.get()
    if loads is not None:
        if isinstance(kernel, JITFunction):
            compiled = kernel.warmup(*args, grid=tuple(grid), **constants)
            assert not loads or compiled.run  # which loads it
        return
    with _no_compiling_if_capturing():
        compiled = kernel[tuple(grid)](*args, **constants)
    recording = _recording.get()
    if recording is None:
        return
    if not isinstance(kernel, JITFunction) or compiled is None:
        recording.steps = None  # the interpreter
        return
    parameters = kernel.signature.parameters
    rest = [constants.get(n, parameters[n].default) for n in kernel.arg_names[len(args) :]]
    recording.add(kernel, compiled, grid, [*args, *rest])


def empty(shape: Sequence[int] | int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty` for memory that kernels write and read within one `repeated` computation."""
    piece = torch.empty(shape, dtype=dtype, device=device)
    recording = _recording.get()
    if recording is not None:
        recording.pieces.append(piece)
    return piece


def repeated(key: Hashable, tensors: Sequence[torch.Tensor], compute: Callable[[], None]) -> None:
    """Run ``compute``, or only its launches if it has run with this key.

    Args:
        key: everything that decides about the launches but the tensors: sizes, codes, tiles.
        tensors: all that kernels are given but what `empty` and `kept_on_device` make. Their dtypes
            and device are part of the key.
        compute: makes its launches by `launch`, all in one stream, and does nothing else that
            matters: what it is for lies in ``tensors`` afterwards.

    Raises:
        ErnieQuantError: see `launch`.
    """
    first = tensors[0]
    if _INTERPRETED or first.is_meta or _rehearsal.get() is not None:
        return compute()
    key = (key, first.device, triton.runtime.driver.active, *[t.dtype for t in tensors])
    known = _launches.get(key)
    addresses = [tensor.data_ptr() for tensor in tensors]
    together = 0
    for address in addresses:
        together |= address
    plain = together % _SPECIALIZED == 0 and not _watched()
    if known is not None and plain:
        workspace = torch.empty(known.workspace_bytes, dtype=torch.uint8, device=first.device)
        addresses.append(workspace.data_ptr())
        return _again(known.steps, addresses)
    if known is not None or not plain:
        return compute()
    recording = _Recording(tensors)
    token = _recording.set(recording)
    try:
        compute()
    finally:
        _recording.reset(token)
    if recording.steps:
        size = sum(_rounded(piece.nbytes) for piece in recording.pieces)
        with _keeping:
            while len(_launches) >= MOST_KEPT:
                del _launches[next(iter(_launches))]
            _launches[key] = _Launches(recording.steps, size)


def compile_all(rehearse: Callable[[], None]) -> None:
    """Compile the kernels of everything that a function launches, on all cores, and load them into
    the current device. Nothing is launched, so tensors may be without memory (``meta``).

    Raises:
        ErnieQuantError: a CUDA graph is being captured.
    """
    if is_capturing():
        raise _cold("all that is compiled now")
    if _INTERPRETED:
        return
    # Most of it runs in LLVM and in processes of the assembler, without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
        _rehearse(rehearse, loads=False)
    _rehearse(rehearse, loads=True)


def _rehearse(rehearse: Callable[[], None], loads: bool) -> None:
    token = _rehearsal.set(loads)
    try:
        rehearse()
    finally:
        _rehearsal.reset(token)


def _again(steps: Sequence[_Step], addresses: Sequence[int]) -> None:
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    for step in steps:
        args = step.template.copy()
        for at, slot, offset in step.pointers:
            args[at] = addresses[slot] + offset
        kernel = step.kernel
        kernel.run(
            *step.grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *args
        )


def _watched() -> bool:
    """Whether somebody asked Triton to be told of every launch, as profilers do."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def _no_compiling_if_capturing() -> Iterator[None]:
    if not is_capturing():
        yield
        return
    # Loading a compiled kernel into the device fails in a capture, or is recorded and lost.
    runtime, thread = triton.knobs.runtime, threading.get_ident()
    before = runtime.jit_cache_hook

    def refuse(**told: Any) -> bool:
        if threading.get_ident() == thread:
            raise _cold(f"kernel {told['fn'].name}")
        return bool(before(**told)) if before is not None else False

    runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        runtime.jit_cache_hook = before


def kept_on_device(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`functools.cache` for tensors that never change and that kernels are given.

    The function made raises ErnieQuantError where the tensor would first be built in the capture of
    a CUDA graph: its memory would belong to the graph.
    """

    @cache
    def kept(args: tuple[Any, ...]) -> torch.Tensor:
        if is_capturing():
            raise _cold("a constant of the kernels")
        tensor = build(*args)
        if tensor.device.type != "meta":
            _kept.append(tensor)
        return tensor

    @wraps(build)
    def function(*args: Any) -> torch.Tensor:
        return kept(args)

    return function


def _cold(what: str) -> ErnieQuantError:
    return ErnieQuantError(
        f"a CUDA graph is being captured, but {what} is not ready; call erniequant.warm_up(model) "
        "before the capture"
    )
