"""Where the time of a thread goes, by sampling its stack."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import FrameType

INTERVAL = 0.004
"""Seconds between samples."""


def sampled(work: Callable[[], object], phases: Mapping[str, str], rest: str) -> dict[str, float]:
    """Run ``work`` on this thread; seconds of processor time that it took, by phase.

    The innermost function named in ``phases`` tells the phase; a sample without any counts as
    ``rest``. Work outside of Python counts for the function that began it.
    """
    counts: Counter[str] = Counter()
    mine, done = threading.get_ident(), threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            frame = sys._current_frames().get(mine)
            counts[_phase(frame, phases, rest)] += 1

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.thread_time()
    try:
        work()
    finally:
        seconds = time.thread_time() - start
        done.set()
        watcher.join()
    total = sum(counts.values())
    return {phase: seconds * count / total for phase, count in counts.most_common()}


def _phase(frame: FrameType | None, phases: Mapping[str, str], rest: str) -> str:
    while frame is not None:
        if frame.f_code.co_name in phases:
            return phases[frame.f_code.co_name]
        frame = frame.f_back
    return rest
