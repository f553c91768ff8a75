"""Measure the time of a layer on the host, count compilations, and write the tables of
docs/performance.md about them.

Run from the repository root: ``python -m benchmarks.kernels.host``; needs Triton's compiler and no
GPU, and times this machine's CPU.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton

from benchmarks.pages import DOCS, fill
from erniequant_kernels.bench.host import HostTime, host_time, layer, mocked_driver, variants
from erniequant_kernels.bench.problem import SHAPES
from erniequant_kernels.cpu.machine import machine

PAGE = DOCS / "performance.md"
TOKENS = (1, 16, 64, 2048)
EVERY = range(1, 4097)
ARCH = 90


@contextmanager
def ordinary_launches() -> Iterator[None]:
    """A layer makes its launches by Triton each time, as it does while a profiler watches."""
    runtime: Any = triton.knobs.runtime
    before, runtime.launch_enter_hook = runtime.launch_enter_hook, lambda _: None
    try:
        yield
    finally:
        runtime.launch_enter_hook = before


def time_rows() -> Iterator[str]:
    """Rows of microseconds by tokens, at 2 bits."""
    yield "| tokens | launches kept: best (median), µs | launched by Triton: best (median), µs |"
    yield "|---|---|---|"

    def cell(time: HostTime) -> str:
        return f"{1e6 * time.best:.0f} ({1e6 * time.median:.0f})"

    with mocked_driver(ARCH):
        make = layer(SHAPES["21b"], 2, ARCH)
        for tokens in TOKENS:
            run = make(tokens)
            kept = host_time(run)
            with ordinary_launches():
                ordinary = host_time(run)
            yield f"| {tokens} | {cell(kept)} | {cell(ordinary)} |"


def variant_rows() -> Iterator[str]:
    """Rows of the most variants of each kernel for one matrix."""
    most: dict[str, dict[str, int]] = {}
    columns = [(shape, bits) for shape in ("21b", "vl", "300b") for bits in (2, 3, 4)]
    titles = [f"{shape}, {bits} bits" for shape, bits in columns]
    for (shape, bits), title in zip(columns, titles, strict=True):
        for (kernel, _), count in variants(SHAPES[shape], bits, EVERY, ARCH).items():
            row = most.setdefault(kernel.removesuffix("_kernel"), {})
            row[title] = max(row.get(title, 0), count)
    yield f"| kernel | {' | '.join(titles)} |"
    yield "|---" * (1 + len(titles)) + "|"
    for kernel, row in most.items():
        yield f"| {kernel} | {' | '.join(str(row.get(title, 0)) for title in titles)} |"


def main() -> None:
    """Write the tables."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    fill(PAGE, "host", "\n".join(time_rows()))
    fill(PAGE, "host_cpu", f"{machine().name}, Triton {triton.__version__}, sm_{ARCH}.")
    fill(PAGE, "variants", "\n".join(variant_rows()))


if __name__ == "__main__":
    main()
