"""The machine: devices by name, memory that is free or was taken, and giving it back."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

from erniequant.errors import ErnieQuantError


def resolve_device(device: str) -> torch.device:
    """The device meant by "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ErnieQuantError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ErnieQuantError(
            f"no such device {device!r}; use auto, cpu, cuda or cuda:N"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ErnieQuantError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ErnieQuantError(f"device {device}: torch finds no GPU here; use --device cpu")
    return resolved


def product_dtype(device: torch.device) -> torch.dtype:
    """The faster type for products on a device: bfloat16 or float32."""
    fast = device.type == "cuda" or (device.type == "cpu" and fast_bfloat16())
    return torch.bfloat16 if fast else torch.float32


def fast_bfloat16() -> bool:
    """True if products in bfloat16 are faster on this processor than in float32."""
    # torch runs them on every processor, but without these instructions at half the speed.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def return_freed_memory() -> None:
    """From now on, have freed matrices go back to the system, where its C library can (glibc).

    By itself it raises the size from which it does that with every matrix freed; others leave
    holes that the next does not fit. That was 0.4 GB after a few experts of the 21B model.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 8 << 20
"""Smaller ones are reused at once: fresh pages for them cost more time than they save memory."""


def trim_memory() -> None:
    """Give memory freed so far back to the system, where its C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Bytes that this process can still have: free memory, within its control group."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/proc/meminfo").read_text()
        available = 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", text)[0])
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass  # another system, or no limit ("max")
    return available


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    with contextlib.suppress(OSError, IndexError):
        # The other figure begins with the peak of the process that started this one.
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_vram(device: torch.device) -> int:
    """Peak memory that torch has taken on a GPU so far, in bytes; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
