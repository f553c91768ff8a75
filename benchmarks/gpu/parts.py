"""The parts of `make gpu`, most telling first, and their limits in seconds.

Limits are two to three times what a part is expected to take on a machine with 16 cores, so that
one that hangs leaves time for those behind it.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.runner import Part
from benchmarks.pages import ROOT

WORKERS = 8
"""Processes of a test part, each with a context on the card; more would compile the same twice."""

EXACT = "one_hot or every_register_value"
"""Tests by name that compare every decoded weight of every code."""

FIRST_FILES = ("test_packed_gemm", "test_fused_gemm", "test_moe", "test_rotation")
USES_A_CARD = '"cuda" if torch.cuda.is_available()'
"""A test file with this text runs on the card where there is one."""

NEEDS_NO_CARD = ("test_bench", "test_tune")
"""Such files with times that are made up."""

ONE_PROCESS = ("test_large_offsets",)
"""Buffers of 9 GB."""


TUNE_SECONDS = 180
"""After which the search for tile sizes begins with no other batch."""


def parts(tuning: Path) -> list[Part]:
    """All, in order.

    tuning: where the search for tile sizes writes its table.
    """
    return [*_first(), *_rest(), _tune(tuning)]


def _first() -> Iterator[Part]:
    yield _program("compile, 21b", 100, "compile", tokens="1,16,64,2048", bits="2,4,16")
    kernels = [path.as_posix() for path in test_files() if "kernels" in path.parts]
    yield _tests("exact decoding", 100, *kernels, "-k", EXACT, workers=WORKERS)
    yield _program("products, 21b", 100, "products", tokens="1,16,64,2048", bits="2,4")
    yield _program("graphs, 21b", 60, "graphs", tokens="1,16,64,2048", bits="2,4,3")
    yield _program("a model, end to end", 100, "model", bits="2,4")
    yield _program("encoder", 40, "encoder", bits="2,3,4")
    yield _program("search of codes", 60, "search")


def _rest() -> Iterator[Part]:
    yield _program(
        "compile, others", 100, "compile", shapes="21b,vl", tokens="1,4,16,64,256,1024,2048",
        bits="2,3,4,16",
    )  # fmt: skip
    yield _program("products, 21b, other batches", 60, "products", tokens="4,256,1024", bits="2,4")
    yield _program("products, vl", 60, "products", shapes="vl", tokens="1,16,256", bits="2,4")
    yield _program("products, 21b, 3 bits", 60, "products", tokens="1,16,64,2048", bits="3")
    yield from map(_test_file, test_files())
    yield _program("compile, 300b", 100, "compile", shapes="300b", tokens="1,16", bits="2,4,16")
    yield _program("products, 300b", 90, "products", shapes="300b", tokens="1,16", bits="2,4")


def test_files() -> list[Path]:
    """Files of tests that use a card, from the root of the repository; kernels first."""
    found = [
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("test_*.py")
        if path.stem not in NEEDS_NO_CARD and USES_A_CARD in path.read_text("utf-8")
    ]
    first = {name: place for place, name in enumerate(FIRST_FILES)}
    return sorted(
        found,
        key=lambda p: (first.get(p.stem, len(first)), "kernels" not in p.parts, p.as_posix()),
    )


def _test_file(path: Path) -> Part:
    workers = 0 if path.stem in ONE_PROCESS else WORKERS
    return _tests(path.as_posix(), 90, path.as_posix(), workers=workers)


def _tune(tuning: Path) -> Part:
    command = ["-m", "erniequant_cli", "bench", "tune", "--shape", "21b", "--bits", "2,4"]
    command += ["--seconds", str(TUNE_SECONDS), "--output", str(tuning)]
    return Part("tile sizes, 21b", tuple(command), TUNE_SECONDS + 60, least=60)


def _program(name: str, limit: float, program: str, **options: str) -> Part:
    given = (word for key, value in options.items() for word in (f"--{key}", value))
    return Part(name, ("-m", "benchmarks.gpu.run", program, *given), limit)


def _tests(name: str, limit: float, *arguments: str, workers: int) -> Part:
    options: tuple[str, ...] = (
        "--quiet",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.gpu.records",
    )
    # The machine has the python it has: without the plugin, in one process.
    if importlib.util.find_spec("xdist") and workers:
        processes = min(workers, os.cpu_count() or 1)
        options += ("--numprocesses", str(processes), "--dist", "load")
    return Part(name, ("-m", "pytest", *options, *arguments), limit)
