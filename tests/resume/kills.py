"""Kill a quantisation at random points, go on, and compare with one that was never interrupted."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Driver:
    """A child that runs quantisations on request; see driver.py."""

    def __init__(self) -> None:
        path = ":".join(str(ROOT / folder) for folder in (".", "kernels", "cli", "calib_data"))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "PATH": ""},
        )
        assert self._answer() == {"ready": True}

    def run(self, src: Path, dst: Path, options: dict[str, Any], **request: Any) -> dict[str, Any]:
        """The outcome of one quantisation: ok, error, traceback or signal."""
        assert self._process.stdin is not None
        request |= {"src": str(src), "dst": str(dst), "options": options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a result but the report, which holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "quantization_report.json"
    }


def survive_kills(
    driver: Driver,
    source: Path,
    options: dict[str, Any],
    folder: Path,
    kills: int,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Kill runs ``kills`` times in all; returns everything that went wrong, one line each.

    A run is killed one to three times before it may end. Threads and memory change between
    sessions, which must not change the result.
    """
    choose = random.Random(seed)
    whole = folder / "whole"
    outcome = driver.run(source, whole, options)
    if not outcome.get("ok"):
        return [f"the uninterrupted run: {outcome}"]
    expected, events = contents(whole), outcome["events"]
    problems, done = [], 0
    while done < kills:
        points = []
        dst = folder / f"killed-{done}"
        for _ in range(min(choose.randint(1, 3), kills - done)):
            points.append(choose.randint(1, events))
            varied = options | {
                "threads": choose.choice([1, 2, 3]),
            }
            tight = choose.random() < 0.5
            outcome = driver.run(source, dst, varied, kill_at=points[-1], tight=tight)
            done += 1
            if outcome.get("ok"):
                break  # what was left took fewer steps than that
            if outcome.get("signal") != 9:
                problems.append(f"seed {seed}, killed at {points}: {outcome}")
                break
            if (dst / "config.json").exists() and not (dst / ".erniequant-work").exists():
                break
        if not (dst / "config.json").exists() or (dst / ".erniequant-work").exists():
            outcome = driver.run(source, dst, options)
            if not outcome.get("ok"):
                problems.append(f"seed {seed}, killed at {points}, then: {outcome}")
        if contents(dst) != expected:
            problems.append(f"seed {seed}, killed at {points}: another result")
        say(f"{done} kills, {len(problems)} problems")
        shutil.rmtree(dst)
    return problems
