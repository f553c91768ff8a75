"""Measure memory and time of calibrating on large files.

    python -m benchmarks.large_models.calibration --work DIR

Makes texts and records of several sizes from the built-in collection, and quantises a micro model
(of random weights, one token per character: the most tokens that a text can have) on each, in a
process of its own. Writes the figures into docs/large_models.md.
"""

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS, fill
from erniequant_data import calibration_text
from testing.micro_model import add_tokenizer, write_micro_ernie

RUN = Path(__file__).with_name("run.py")
PAGE = DOCS / "large_models.md"
SIZES = (50, 100, 200)
"""Megabytes."""

BUDGET = "800MB"
WRITERS = ("txt", "txt.gz", "jsonl", "json", "csv", "parquet")


def main() -> None:
    """Measure and fill the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=WRITERS)
    arguments = parser.parse_args()
    work = arguments.work
    source = add_tokenizer(write_micro_ernie(work / "source"))
    runs = {"built-in": {0: measure(source, work / "out", "builtin")}}
    for kind in arguments.kinds:
        runs[kind] = {}
        for megabytes in SIZES:
            path = work / f"large.{kind}"
            write(path, megabytes * 10**6)
            runs[kind][megabytes] = measure(source, work / f"out-{kind}-{megabytes}", str(path))
            print(kind, megabytes, runs[kind][megabytes], flush=True)
            path.unlink()
    fill(PAGE, "calibration", table(runs))


def write(path: Path, size: int) -> None:
    """A file whose texts have about ``size`` bytes."""
    # A paragraph is a record.
    texts = [text for text in calibration_text().split("\n\n") if text.strip()]
    each = sum(len(text.encode()) + 2 for text in texts)
    records = [{"text": text} for text in texts] * (size // each)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        # Repeated texts would be stored once.
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, path, use_dictionary=False, compression=None)
        return
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        if path.suffix == ".csv":
            import csv

            writer = csv.DictWriter(file, ["text"])
            writer.writeheader()
            writer.writerows(records)
        elif path.suffix == ".json":
            json.dump(records, file, ensure_ascii=False)
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        else:
            file.writelines(r["text"] + "\n\n" for r in records)


def measure(source: Path, target: Path, calib: str) -> dict[str, float]:
    """Peak resident bytes and seconds of one run."""
    options = {
        "src": str(source), "dst": str(target), "bits": 2, "calib": calib, "calib_length": 256,
        "max_tp": 1, "effort": "fast", "device": "cpu", "max_memory": BUDGET,
    }  # fmt: skip
    command = [sys.executable, str(RUN), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(runs_by_kind: dict[str, dict[int, dict[str, float]]]) -> str:
    """Peaks and times, one line a kind of file."""
    heads = " | ".join(f"{megabytes} MB" for megabytes in SIZES)
    lines = [f"| file | {heads} |", "|---|" + "---|" * len(SIZES)]
    (alone,) = runs_by_kind.pop("built-in").values()
    for kind, runs in runs_by_kind.items():
        lines.append(f"| .{kind} | {' | '.join(_figures(run) for run in runs.values())} |")
    return "\n".join(lines) + f"\n\nThe built-in text takes {_figures(alone)}.\n"


def _figures(run: dict[str, float]) -> str:
    return f"{run['peak'] / 1e9:.2f} GB, {run['seconds']:.0f} s"


if __name__ == "__main__":
    main()
