"""Write the tables of docs/performance.md about the CPU, from the JSON files beside this program.

Run from the repository root. ``python -m benchmarks.cpu.page measure`` takes the measurements
before, a quarter of an hour on an idle machine; names of files narrow it: ``measure 21b avx2``.
`benchmarks.cpu.peer` writes peer.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS, fill

PAGE = DOCS / "performance.md"
FOLDER = Path(__file__).parent
PACKED_BELOW = 16
MEASUREMENTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "21b": (["--shape", "21b"], {}),
    "vl": (["--shape", "vl"], {}),
    "300b": (["--shape", "300b", "--bits", "2,4", "--tokens", "1,16,128"], {}),
    "avx2": (["--bits", "2,3,4", "--tokens", "1,16,128"], {"ERNIEQUANT_CPU": "haswell"}),
}
"""Options and environment of `bench kernels --device cpu`, by file."""


def measure(name: str) -> None:
    """Run the command, and keep its result."""
    options, environment = MEASUREMENTS[name]
    command = [sys.executable, "-m", "erniequant", "bench", "kernels", "--device", "cpu", *options]
    command += ["--json", str(FOLDER / f"{name}.json")]
    subprocess.run(command, env=os.environ | environment, check=True)


def load(name: str) -> dict[str, Any] | None:
    """A result by its file's name, or None if it was never measured."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return found


def speed_rows(results: list[dict[str, Any]]) -> Iterator[str]:
    """One row for each packed method and batch."""
    yield (
        "| shape | tokens | code | ms | G products/s | GB/s | of the limit | × bf16 | × fp32 "
        "| rounds |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for result in results:
        for row in result["rows"]:
            if row["bits"] >= PACKED_BELOW:
                continue
            ratios = {
                r["rival"][:4]: r for r in result["ratios"]
                if all(r[key] == row[key] for key in ("shape", "tokens", "method"))
            }  # fmt: skip
            bf16, fp32 = (spread(ratios[name]) for name in ("bf16", "fp32"))
            yield (
                f"| {row['shape']} | {row['tokens']} | {row['method'].removeprefix('erniequant ')} "
                f"| {row['microseconds'] / 1000:.2f} | {row['products_per_second']:.1f} "
                f"| {row['gigabytes_per_second']:.1f} | {row['memory_limit_percent']:.0f} % "
                f"| {bf16} | {fp32} | {ratios['bf16']['rounds']} |"
            )


def spread(ratio: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})"


def condition_rows(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each measurement: the machine, and how busy others kept it."""
    for name, result in results.items():
        facts = result["machine"]
        used = [row["other_cores"] for row in result["rows"]]
        limit = f", triad {result['triad_gb_per_s']:.1f} GB/s" if "triad_gb_per_s" in result else ""
        yield (
            f"- {name}: {facts['processor']}, {facts['threads']} cores, code for "
            f"{facts['code_for']}, torch {facts['torch']} ({facts['torch_capability']}){limit}; "
            f"other processes used {min(used):.2f} to {max(used):.2f} cores meanwhile"
        )


def peer_rows(result: dict[str, Any]) -> Iterator[str]:
    """One row for each method, with how many times as fast ours are."""
    yield "| tokens | method | bits | error | ms | G products/s | 2 bits | 4 bits |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in result["rows"]:
        error = f"{row['error']:.4f}" if row["error"] else ""
        cells = []
        for bits in (2, 4):
            ratio = row["ratios"].get(f"erniequant {bits} bits")
            cells.append(f"{ratio[1]:.2f} ({ratio[0]:.2f} … {ratio[2]:.2f})" if ratio else "")
        yield (
            f"| {row['tokens']} | {row['name']} | {row['bits']:.2f} | {error} "
            f"| {row['microseconds'] / 1000:.2f} | {row['products_per_second']:.1f} "
            f"| {' | '.join(cells)} |"
        )


def sections() -> dict[str, Iterator[str]]:
    """Lines of every table by its name."""
    found = {name: load(name) for name in (*MEASUREMENTS, "peer")}
    there = {name: result for name, result in found.items() if result is not None}
    wide = [there[name] for name in ("21b", "vl", "300b") if name in there]
    tables = {"cpu": speed_rows(wide), "cpu_conditions": condition_rows(there)}
    if "avx2" in there:
        tables["cpu_avx2"] = speed_rows([there["avx2"]])
    if "peer" in there:
        tables["cpu_peer"] = peer_rows(there["peer"])
    return tables


def main() -> None:
    """Measure if asked to, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("table", "measure"), nargs="?", default="table")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; by default all")
    options = parser.parse_args()
    unknown = set(options.names) - set(MEASUREMENTS)
    if unknown:
        parser.error(f"no measurement {', '.join(sorted(unknown))}")
    if options.action == "measure":
        for name in options.names or MEASUREMENTS:
            measure(name)
    for name, rows in sections().items():
        fill(PAGE, name, "\n".join(rows))


if __name__ == "__main__":
    main()
