"""Run the parts of a report one after the other, each in a process of its own with a time limit.

The report is written while a part runs, so that whatever ends the run, what was found is there. A
later run of the same sources on the same card continues: what is complete is not repeated, what was
never begun comes before what ran out of time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import VARIABLE, read, summary
from erniequant.checkpoint.files import write_file

PASSED, FAILED, TIMED_OUT, NOT_REACHED, RUNNING = (
    "passed", "failed", "timed out", "not reached", "running",
)  # fmt: skip
"""States of a part; "running" is left in the report of a run that was ended from outside."""

COMPLETE = (PASSED, FAILED)
OUTPUT_CHARACTERS = 8000
POLL_SECONDS = 0.2
WRITE_SECONDS = 2.0


@dataclass(frozen=True)
class Part:
    """A piece of the work.

    Attributes:
        name: unique, for reader and report.
        arguments: of the Python interpreter.
        limit: seconds after which it is stopped.
        least: seconds with which it is worth beginning.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    least: float = 15.0


def in_order(parts: Sequence[Part], before: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    """The parts that are still to be run: those never begun, then those that were not finished."""
    states = {part.name: before.get(part.name, {}).get("status", NOT_REACHED) for part in parts}
    waiting = [part for part in parts if states[part.name] not in COMPLETE]
    return sorted(waiting, key=lambda part: states[part.name] != NOT_REACHED)


class Report:
    """The JSON file: facts that must be equal for a run to continue, and each part's result."""

    def __init__(self, path: Path, facts: Mapping[str, Any], parts: Sequence[Part], fresh: bool):
        """fresh: forget what the file holds."""
        self.path, self.facts = path, dict(facts)
        before = {} if fresh else self._before()
        self.extra: dict[str, Any] = {}
        self.parts: dict[str, dict[str, Any]] = {
            part.name: before.get(part.name, {"status": NOT_REACHED, "limit": part.limit})
            for part in parts
        }

    def _before(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(found[name] == value for name, value in self.facts.items())
            return dict(found["parts"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def write(self) -> None:
        """Put everything into the file, which appears as a whole."""
        text = json.dumps(self.facts | self.extra | {"parts": self.parts}, indent=1) + "\n"
        write_file(self.path, lambda file: file.write(text.encode()))

    def states(self, *wanted: str) -> list[str]:
        """Names of the parts in one of some states."""
        return [name for name, entry in self.parts.items() if entry["status"] in wanted]


def say_line(text: str) -> None:
    """A line on stdout at once: whoever ends the run gets all of it."""
    print(text, flush=True)


def say_more(text: str) -> None:
    """What a part printed, as it is."""
    print(text, end="", flush=True)


def run_all(
    parts: Sequence[Part], report: Report, seconds: float,
    say: Callable[[str], object] = say_line, echo: Callable[[str], object] = say_more,
    conclude: Callable[[Report], object] = lambda report: None,
) -> None:  # fmt: skip
    """Run what is still to be run, for so many seconds in all.

    Args:
        say, echo: take lines about the parts, and what the parts print.
        conclude: adds to the report what follows from the parts so far.
    """
    end = time.monotonic() + seconds
    for part in in_order(parts, report.parts):
        left = end - time.monotonic()
        if left < min(part.least, part.limit):
            say(f"not reached: {part.name} ({left:.0f} s left)")
            continue
        say(f"== {part.name} (at most {min(left, part.limit):.0f} s)")
        run_part(part, min(left, part.limit), report, echo)
        conclude(report)
        report.write()
        entry = report.parts[part.name]
        say(f"== {part.name}: {entry['status']} after {entry['seconds']:.1f} s")


def run_part(part: Part, limit: float, report: Report, echo: Callable[[str], object]) -> None:
    """Run one part for so many seconds at the most; its result goes into the report meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        output, records = Path(folder) / "output", Path(folder) / "records"
        begun = written = time.monotonic()
        shown = 0
        with output.open("wb") as file:
            process = _start(part, file, records)

        def note(status: str) -> None:
            nonlocal shown
            text = output.read_bytes().decode("utf-8", "replace")
            echo(text[shown:])
            shown = len(text)
            report.parts[part.name] = {
                "status": status, "seconds": round(time.monotonic() - begun, 1),
                "limit": round(limit, 1), "exit_code": process.poll(),
                "output": text[-OUTPUT_CHARACTERS:],
            } | summary(read(records))  # fmt: skip
            report.write()

        try:
            note(RUNNING)
            while process.poll() is None and time.monotonic() - begun < limit:
                time.sleep(POLL_SECONDS)
                if time.monotonic() - written > WRITE_SECONDS:
                    written = time.monotonic()
                    note(RUNNING)
            stopped = process.poll() is None
        finally:
            _stop(process)
        note(TIMED_OUT if stopped else PASSED if process.returncode == 0 else FAILED)


def _start(part: Part, output: Any, records: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | {VARIABLE: str(records), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *part.arguments], stdout=output, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
    )  # fmt: skip


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a part and the workers that it started: they are in a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
