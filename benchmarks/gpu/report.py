"""Measure on a GPU, into one JSON: exact decoding, products against bf16, CUDA graphs, a model from
end to end, the encoder, the search of codes, then all kernel tests and the search for tile sizes.

``make gpu`` runs this from the repository root and writes ``gpu-report.json``, in ten minutes or
less, the most telling parts first. Another run of the same sources on the same card continues with
what the first did not reach. Exits with 1 when a part fails or does not end, with 2 when there is
no GPU.
"""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.compared import compare, fastest, predictions, table, worst
from benchmarks.gpu.parts import parts
from benchmarks.gpu.runner import FAILED, NOT_REACHED, TIMED_OUT, Part, Report, run_all
from benchmarks.pages import ROOT

REPORT = Path("gpu-report.json")
SECONDS = 570.0
SOURCES = ("erniequant", "kernels", "cli", "calib_data", "testing", "tests", "benchmarks")
"""Folders whose Python and JSON files decide what is measured."""


def commit() -> str:
    """The commit that is being measured, or "unknown" outside a git checkout."""
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return answer.stdout.strip() or "unknown"


def sources() -> str:
    """A hash of the sources: a commit says nothing of changes that are not in it."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "__pycache__" not in path.parts:
                found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def facts() -> dict[str, Any]:
    """What must be the same for a run to continue another."""
    from erniequant_kernels.bench.machine import machine

    return {"machine": machine(), "commit": commit(), "sources": sources()}


def add_comparison(report: Report) -> str:
    """Put measured times beside the predicted ones; gives lines for a terminal."""
    rows = [
        found["row"]
        for entry in report.parts.values() for found in entry.get("records", []) if "row" in found
    ]  # fmt: skip
    compared = compare(fastest(rows), predictions(report.facts["machine"]["card"]))
    if not compared:
        return "nothing that was measured is predicted"
    largest = worst(compared)
    report.extra["predicted"] = [asdict(c) | {"error": c.error} for c in compared]
    report.extra["largest_errors"] = [asdict(c) | {"error": c.error} for c in largest]
    return f"{table(compared)}\nlargest errors:\n{table(largest)}"


def listing(every: Sequence[Part]) -> str:
    """The parts in order with their limits and commands."""
    return "\n".join(
        f"{i:3} {part.limit:5.0f} s  {part.name:32} python {' '.join(part.arguments)}"
        for i, part in enumerate(every, 1)
    )


def main() -> int:
    """Run every part that time allows, and write the report meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--list", action="store_true", help="print the parts in order and their limits"
    )
    parser.add_argument("--fresh", action="store_true", help="start anew instead of continuing")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all parts (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=REPORT, help="the report (%(default)s)")
    options = parser.parse_args()
    every = parts(options.output.with_suffix(".tuning.json"))
    if options.list:
        print(listing(every))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU and a CUDA build of torch; there is none here")
        return 2
    report = Report(options.output, facts(), every, options.fresh)
    run_all(every, report, options.seconds, conclude=add_comparison)
    print(add_comparison(report))
    report.write()
    return conclusion(report, options.output)


def conclusion(report: Report, path: Path) -> int:
    """Say what failed and what is left; gives the exit code."""
    for state in (FAILED, TIMED_OUT, NOT_REACHED):
        if names := report.states(state):
            print(f"{state}: {'; '.join(names)}")
    print(f"wrote {path}; another run continues where this one stopped")
    return 1 if report.states(FAILED, TIMED_OUT) else 0


if __name__ == "__main__":
    sys.exit(main())
