"""Count the kernels' machine code again and write the tables of docs/performance.md.

Run from the repository root: ``python -m benchmarks.kernels.page``; needs no GPU. Records the costs
in the kernels' budget.json as well.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from benchmarks.kernels.prediction import CARDS, bf16_seconds, packed_seconds
from benchmarks.pages import DOCS, fill
from erniequant_kernels import machine_code_budget as static
from erniequant_kernels.bench.problem import SHAPES
from erniequant_kernels.tuning import tables

PAGE = DOCS / "performance.md"
BUDGET = Path(static.__file__).with_name("budget.json")
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)


def static_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of the kernels that decode."""
    names = ("issue slots", "all", "ALU", "multiply", "memory", "matrix", "registers", "shared")
    yield f"| kernel | arch | {' | '.join(names)} |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for record in records:
        counts = record["per_weight"]
        if counts:
            pipes = " | ".join(
                f"{counts[name]:.2f}" for name in ("all", "alu", "multiply", "memory", "matrix")
            )
            yield (
                f"| {record['kernel']} | sm_{record['arch']} | {record['issue_cost']:.2f} "
                f"| {pipes} | {record['registers']} | {record['shared_bytes']} |"
            )


def other_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of the kernels that do not decode."""
    yield "| kernel | arch | instructions | registers | shared | matrix instruction |"
    yield "|---|---|---|---|---|---|"
    for record in records:
        if not record["per_weight"]:
            where = "a turn" if record["looped"] else "in all"
            yield (
                f"| {record['kernel']} | sm_{record['arch']} | {record['instructions']} {where} | "
                f"{record['registers']} | {record['shared_bytes']} | {record['matrix_opcode']} |"
            )


def prediction_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of predicted microseconds for a layer of 21B, and of the speed-up over bf16."""
    shape = SHAPES["21b"]
    yield "| card | tokens | bf16 | 4 bits | 3 bits | 2 bits | 2 bits is bound by |"
    yield "|---|---|---|---|---|---|---|"
    for card in CARDS:
        costs = {r["kernel"]: r["issue_cost"] for r in records if r["arch"] == card.arch}
        tuning = tables()[f"sm_{card.arch}"]
        for tokens in TOKENS:
            plain = bf16_seconds(card, shape, tokens)
            cells, bound = [], ""
            for bits in (4, 3, 2):
                seconds, bound = packed_seconds(card, shape, tokens, bits, costs, tuning)
                cells.append(f"{1e6 * seconds:.0f} ({plain / seconds:.1f} ×)")
            yield (
                f"| {card.name} | {tokens} | {1e6 * plain:.0f} | {' | '.join(cells)} | {bound} |"
            )


def main() -> None:
    """Write the tables and the budget."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    records = list(static.records())
    spilling = [f"sm_{r['arch']} {r['kernel']}" for r in records if r["spill_bytes"]]
    if spilling:
        sys.exit(f"the page says that nothing spills, but: {', '.join(spilling)}")
    for name, rows in sections(records).items():
        fill(PAGE, name, "\n".join(rows))
    BUDGET.write_text(json.dumps(static.new_budget(records), indent=1) + "\n", encoding="utf-8")


def sections(records: list[dict[str, Any]]) -> dict[str, Iterator[str]]:
    """Lines of every table by its name."""
    return {
        "static": static_rows(records),
        "other": other_rows(records),
        "prediction": prediction_rows(records),
        "version": iter([f"Triton {triton.__version__}, 21B shapes, tiles of 256 weights."]),
    }


if __name__ == "__main__":
    main()
