"""Measure memory and time of calibrating on large files.

    python docs/measure_calibration.py --work DIR

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

DOCS = Path(__file__).parent
PAGE = DOCS / "large_models.md"
BEGIN, END = "<!-- calibration:begin -->", "<!-- calibration:end -->"
SIZES = (50, 100, 200)
"""Megabytes."""

BUDGET = "800MB"
WRITERS = ("txt", "txt.gz", "jsonl", "json", "csv", "parquet")
RUN = """
import json, re, sys, time
import erniequant
start = time.perf_counter()
erniequant.quantize(
    sys.argv[1], sys.argv[2], bits=2, calib=sys.argv[3], calib_length=256, max_tp=1,
    effort="fast", device="cpu", max_memory=sys.argv[4],
)
# Not ru_maxrss, which starts at what the parent had.
peak = int(re.findall(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[0]) * 1024
print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=WRITERS)
    arguments = parser.parse_args()
    work = arguments.work
    sys.path.insert(0, str(DOCS.parent))
    from tests.micro import add_tokenizer, write_micro_ernie

    source = add_tokenizer(write_micro_ernie(work / "source"))
    found = {"built-in": {0: measure(source, work / "out", "builtin")}}
    for kind in arguments.kinds:
        found[kind] = {}
        for megabytes in SIZES:
            path = work / f"large.{kind}"
            write(path, megabytes * 10**6)
            found[kind][megabytes] = measure(source, work / f"out-{kind}-{megabytes}", str(path))
            print(kind, megabytes, found[kind][megabytes], flush=True)
            path.unlink()
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(found) + END + rest.split(END)[1])


def write(path: Path, size: int) -> None:
    """A file whose texts have some ``size`` bytes."""
    from erniequant_data import calibration_text

    # A paragraph is a record.
    texts = [text for text in calibration_text().split("\n\n") if text.strip()]
    each = sum(len(text.encode()) + 2 for text in texts)
    records = [{"text": text} for text in texts] * (size // each)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        # Texts that come again would be stored once.
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
    command = [sys.executable, "-c", RUN, str(source), str(target), calib, BUDGET]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Peaks and times, one line a kind of file."""
    heads = " | ".join(f"{megabytes} MB" for megabytes in SIZES)
    lines = [f"| file | {heads} |", "|---|" + "---|" * len(SIZES)]
    (alone,) = found.pop("built-in").values()
    for kind, runs in found.items():
        lines.append(f"| .{kind} | {' | '.join(_figures(run) for run in runs.values())} |")
    return "\n".join(lines) + f"\n\nThe built-in text takes {_figures(alone)}.\n"


def _figures(run: dict[str, float]) -> str:
    return f"{run['peak'] / 1e9:.2f} GB, {run['seconds']:.0f} s"


if __name__ == "__main__":
    main()
