"""Measure on a GPU, into one JSON: kernel tests on the card, the benchmark, an encoder rate.

``make gpu`` runs this from the repository root and writes ``gpu-report.json``, in ten minutes or
less: batches that do not fit in that time are left out and named. Exits with 1 when a test or a
result is wrong, with 2 when there is no GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.codes import study
from erniequant.codes import code_for_bits, register_length
from erniequant_kernels.bench import run as bench
from erniequant_kernels.bench.machine import machine
from erniequant_kernels.bench.rows import Row, verdicts, wrong
from erniequant_kernels.bench.timing import copy_bandwidth, cuda_timer

REPORT = Path("gpu-report.json")
TESTS = (
    "tests/kernels",
    "tests/ccq/test_kernel.py",
    "tests/ccq/test_moe.py",
    "tests/runtime/test_ops.py",
    "tests/runtime/test_experts.py",
)
TEST_SECONDS, BENCH_SECONDS = 330, 540  # since the start
# Most telling first, in case time runs out.
BATCHES = (("21b", (1, 16, 2048, 4, 64, 256, 1024)), ("vl", (1, 16, 256)), ("300b", (1, 16)))
BITS = (2, 4, 3)


def commit() -> str:
    """The commit that is being measured, or "unknown" outside a git checkout."""
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def test() -> dict[str, Any]:
    """The kernel tests on the card; counting machine code needs none, so it is left out."""
    command = [sys.executable, "-m", "pytest", "--quiet", "-x", *TESTS]
    command += ["--ignore", "tests/kernels/test_static.py"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not done after {TEST_SECONDS} s"}
    print(done.stdout)
    lines = done.stdout.strip().splitlines()
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else ""}


def benchmark(started: float) -> dict[str, Any]:
    """Every batch that time allows, against bfloat16."""
    bandwidth = copy_bandwidth()
    rows: list[Row] = []
    left_out = []
    for shape, tokens in BATCHES:
        for bits in BITS:
            if time.perf_counter() - started > BENCH_SECONDS:
                left_out.append(f"{shape}, {bits} bits")
                continue
            # bfloat16 does not depend on our bits: once per shape.
            measured = bench.measure(
                [shape], tokens, [bits], torch.device("cuda"), cuda_timer, bandwidth,
                rivals=bits == BITS[0],
            )  # fmt: skip
            for row in measured:
                rows.append(row)
                if time.perf_counter() - started > BENCH_SECONDS:
                    left_out.append(f"{shape}, {bits} bits, what follows {row.tokens} tokens")
                    break
    compared = verdicts(rows)
    for v in compared:
        print(f"{v.shape} {v.tokens} tokens {v.bits} bits: {v.speedup:.2f} x {v.best_bf16}")
    return {
        "copy_gb_per_s": bandwidth / 1e9,
        "rows": [row.to_dict() for row in rows],
        "verdicts": [asdict(v) for v in compared],
        "wrong": wrong(rows),
        "left_out": left_out,
    }


def encoder() -> dict[str, float]:
    """Weights encoded per second on one core of this machine, by code."""
    codes = [code_for_bits(bits, register_length(bits, "standard")) for bits in (2, 3, 4)]
    return {f"{c.name} L{c.register_length}": study.measure(c, 500, seed=0).rate for c in codes}


def main() -> int:
    """Run everything and write the report, after each part."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU and a CUDA build of torch; there is none here")
        return 2
    started = time.perf_counter()
    report: dict[str, Any] = {"machine": machine() | {"commit": commit()}}

    def write(**part: Any) -> None:
        report.update(part, seconds=round(time.perf_counter() - started, 1))
        REPORT.write_text(json.dumps(report, indent=1) + "\n")

    write(tests=test())
    write(encoder_weights_per_second=encoder())
    write(kernels=benchmark(started))
    print(f"wrote {REPORT}")
    return 0 if report["tests"]["passed"] and not report["kernels"]["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
