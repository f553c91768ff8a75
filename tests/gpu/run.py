"""What only a GPU can show, in one JSON: the kernel tests on the card, and what the card is.

``make gpu`` runs this from the repository root and writes ``gpu-report.json``; it grows with the
kernels. Exits with 1 when a test fails, with 2 when there is no GPU.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

REPORT = Path("gpu-report.json")
TESTS = ("tests/kernels", "tests/runtime/test_experts.py")


def commit() -> str:
    """The commit that is being measured, or "unknown" outside a git checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def driver() -> str:
    """The version of the driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
    }


def main() -> int:
    """Run the tests and write the report."""
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU and a CUDA build of torch; there is none here")
        return 2
    started = time.perf_counter()
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", *TESTS], capture_output=True, text=True
    )
    print(tests.stdout)
    lines = tests.stdout.strip().splitlines()
    report = {
        "machine": machine(),
        "tests": {"passed": tests.returncode == 0, "summary": lines[-1] if lines else ""},
        "seconds": round(time.perf_counter() - started, 1),
    }
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {REPORT}")
    return 0 if tests.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
