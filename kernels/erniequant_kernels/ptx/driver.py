"""A driver for Triton that runs what it compiles for a card on this machine's processor.

``install(90)`` makes ``kernel[grid](...)`` take torch tensors on the CPU, compile for sm_90 exactly
as on a card (specialised arguments included) and execute the PTX. It needs a process in which
Triton's own interpreter is off.
"""

from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from erniequant.errors import ErnieQuantError
from erniequant_kernels.ptx.launch import launch
from erniequant_kernels.ptx.machine import WARP

MAX_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory of one program in bytes, by architecture."""


class ProcessorDriver:
    """What Triton asks of a driver when it launches a kernel."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, WARP)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        arch = int(self.target.arch)
        return arch // 10, arch % 10

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _as_array(tensor: torch.Tensor) -> Any:
    """The bytes from a tensor's first element to the end of what its strides reach."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.as_strided(tensor, (last + 1,), (1,)) if tensor.numel() else tensor.flatten()
    return flat.view(torch.uint8).numpy()


def _handles(kernel: Any, arch: int) -> Any:
    """A launcher with the arguments of Triton's own."""
    names = list(kernel.src.signature.items())
    if kernel.metadata.shared > MAX_SHARED.get(arch, 99 << 10):
        raise ErnieQuantError(f"{kernel.name} needs {kernel.metadata.shared} bytes shared")

    def run(
        x: int, y: int, z: int, stream: Any, function: Any, packed_metadata: Any, metadata: Any,
        enter: Any, leave: Any, *values: Any,
    ) -> None:  # fmt: skip
        arguments, tensors = {}, {}
        for (name, kind), value in zip(names, values, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                tensors[name] = value
                arguments[name] = _as_array(value)
            else:
                arguments[name] = value
        done = launch(kernel.asm["ptx"], kernel.metadata.shared, (x, y, z), arguments)
        for name in tensors:
            np.copyto(arguments[name], done.arrays[name])

    return run


def install(arch: int) -> None:
    """Run all kernels of this process so, as if the card were an sm_<arch>.

    Raises:
        ErnieQuantError: Triton's interpreter is on.
    """
    if triton.knobs.runtime.interpret:
        raise ErnieQuantError("compiled kernels need Triton's compiler; unset TRITON_INTERPRET")

    def init_handles(kernel: Any) -> None:
        kernel._run = _handles(kernel, arch)
        kernel.function = kernel.name

    CompiledKernel._init_handles = init_handles
    if not isinstance(CompiledKernel.__dict__.get("run"), property):
        CompiledKernel.run = property(lambda kernel: kernel._run or _initialised(kernel))
    triton.runtime.driver.set_active(ProcessorDriver(arch))


def _initialised(kernel: Any) -> Any:
    kernel._init_handles()
    return kernel._run
