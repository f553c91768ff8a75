"""What a part of `make gpu` found, line by line in a file that the report reads: nothing is lost
when the part is stopped.

As a plugin of pytest (``-p benchmarks.gpu.records``) it records the outcome of every test as soon
as it is known, with the text of a failure.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "GPU_REPORT_RECORDS"
"""Environment variable that names the file."""

FAILURE_CHARACTERS = 3000


def record(**facts: Any) -> None:
    """Add a record; without a file, none is kept."""
    path = os.environ.get(VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records so far; the last line of a part that was stopped may be incomplete."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The records for the report: of tests, numbers by outcome, names and texts of failures, and
    the slowest ones; all others as they are."""
    tests = [r for r in records if "test" in r]
    others = [dict(r) for r in records if "test" not in r]
    found: dict[str, Any] = {"records": others} if others else {}
    if tests:
        outcomes = [r["outcome"] for r in tests]
        slowest = sorted(tests, key=lambda r: -r["seconds"])[:3]
        found["tests"] = {
            "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
            "failures": [
                {"test": r["test"], "text": r["text"]} for r in tests if r["outcome"] == "failed"
            ],
            "slowest": [f"{r['test']}: {r['seconds']:.1f} s" for r in slowest],
        }
    return found


def pytest_runtest_logreport(report: Any) -> None:
    """Called by pytest for each phase of each test; with workers, in each of them as well."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        text = report.longreprtext[-FAILURE_CHARACTERS:] if report.outcome == "failed" else ""
        record(test=report.nodeid, outcome=report.outcome, seconds=report.duration, text=text)
