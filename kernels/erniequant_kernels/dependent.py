# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Programmatic dependent launch: a kernel's programs start while the last ones of the kernel before
still run, and wait for them before they touch what those write or read.

A layer is five kernels in a row, and at one token each takes a few microseconds; this hides the
start of one behind the end of another. The hardware has it from sm_90 on. `launch` decides, by the
constexpr DEPENDENT of a kernel.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST_ARCH = 90
LEAST_DRIVER = 12030
"""CUDA of the driver from which such launches are captured in graphs."""

ARGUMENT = "DEPENDENT"


@triton.jit
def start_next_and_wait(DEPENDENT: tl.constexpr):
    """Let the next kernel's programs start once all of this kernel's have, and wait for the end of
    the kernel before.

    The first statement of a kernel: whatever is read or written before it may be in use. That the
    next kernel waits for the end of this one, and this one for the end of the one before, orders
    all of them.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """As `start_next_and_wait` for the last kernel of a layer: what follows is not ours."""
    if DEPENDENT:
        gdc_wait()


def supported() -> bool:
    """Whether the current device and its driver start kernels early."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < LEAST_ARCH:
        return False
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return version is None or version() >= LEAST_DRIVER
