"""Count the kernels' machine code again and write the tables of docs/performance.md, and that of
decoding in docs/codes.md.

Run from the repository root: ``python -m benchmarks.kernels.page``; needs no GPU, takes some
minutes. Records the costs in the kernels' budget.json as well.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from benchmarks.kernels.cards import CARDS
from benchmarks.kernels.counts import prepare_counts
from benchmarks.kernels.encoder import rate_rows
from benchmarks.kernels.prediction import bf16, predict, wanted
from benchmarks.pages import DOCS, fill
from erniequant.codes import code_for_bits, get_code, register_length
from erniequant_kernels import machine_code_budget as static
from erniequant_kernels.bench.problem import SHAPES
from erniequant_kernels.machine_code_cases import TILE

PAGE = DOCS / "performance.md"
BUDGET = Path(static.__file__).with_name("budget.json")
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)
BITS = (4, 3, 2)
STANDARD = tuple(code_for_bits(bits, register_length(bits, "standard")) for bits in BITS)
TWO_BITS = (get_code("cc2", 12), get_code("cc2s", 12), get_code("cc2s", 16))
FEW_TOKENS = (1, 16, 64, 256)


def static_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of the kernels that decode."""
    figures = {
        "slots": "issue slots", "slots_in_all": "in all", "l1_slots": "level 1",
        "l1_slots_in_all": "in all", "sectors_per_request": "sectors", "uncoalesced": "uncoalesced",
        "conflicts": "conflicts",
    }  # fmt: skip
    pipes = ("alu", "multiply", "matrix")
    names = (*figures.values(), "ALU", "multiply", "matrix", "registers", "shared")
    yield f"| kernel | arch | {' | '.join(names)} |"
    yield f"|---|---{'|---' * len(names)}|"
    for record in records:
        if record["per_weight"] and not searches(record):
            counts = [f"{record['figures'][name]:.2f}" for name in list(figures)[:4]]
            counts += [f"{record['figures'][name]:g}" for name in list(figures)[4:]]
            counts += [f"{record['per_weight'][name]:.2f}" for name in pipes]
            yield (
                f"| {record['kernel']} | sm_{record['arch']} | {' | '.join(counts)} "
                f"| {record['registers']} | {record['shared_bytes']} |"
            )


def searches(record: dict[str, Any]) -> bool:
    """Whether it is of the Viterbi search, whose costs are those of a branch."""
    return str(record["kernel"]).startswith("viterbi ")


def search_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of the Viterbi search."""
    yield "| kernel | arch | issue slots | level 1 | branches | registers | shared |"
    yield "|---|---|---|---|---|---|---|"
    for record in filter(searches, records):
        figures, (_, name, length, _) = record["figures"], record["kernel"].split()
        branches = get_code(name, int(length[1:])).states * record["turns"] // TILE
        yield (
            f"| {record['kernel']} | sm_{record['arch']} | {figures['slots']:.2f} "
            f"| {figures['l1_slots']:.2f} | {branches} | {record['registers']} "
            f"| {record['shared_bytes']} |"
        )


def other_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of the kernels that do not decode."""
    yield "| kernel | arch | instructions | level-1 clocks | sectors | uncoalesced | registers |"
    yield "|---|---|---|---|---|---|---|"
    for record in records:
        if not record["per_weight"]:
            figures = record["figures"]
            yield (
                f"| {record['kernel']} | sm_{record['arch']} | {figures['instructions']} "
                f"| {figures['l1_clocks']:.0f} | {figures['sectors_per_request']:.1f} "
                f"| {figures['uncoalesced']:g} | {record['registers']} |"
            )


def prediction_rows(name: str) -> Iterator[str]:
    """Rows of predicted microseconds for a layer, and of the speed-up over bf16."""
    shape = SHAPES[name]
    bounds = " | ".join(f"{bits} bits is bound by" for bits in BITS)
    yield f"| card | tokens | bf16 | {' | '.join(f'{b} bits' for b in BITS)} | {bounds} |"
    yield f"|---|---|---{'|---' * (2 * len(BITS))}|"
    for card in CARDS:
        for tokens in TOKENS:
            plain = bf16(card, shape, tokens).seconds
            times = [predict(card, shape, tokens, code) for code in STANDARD]
            cells = [f"{1e6 * time.seconds:.0f} ({plain / time.seconds:.1f} ×)" for time in times]
            cells += [time.bound for time in times]
            yield f"| {card.name} | {tokens} | {1e6 * plain:.0f} | {' | '.join(cells)} |"


def two_bit_rows() -> Iterator[str]:
    """Rows of predicted microseconds for a layer of the 21B, by 2-bit code."""
    shape = SHAPES["21b"]
    names = (f"{code.name}, L = {code.register_length}" for code in TWO_BITS)
    yield f"| card | tokens | {' | '.join(names)} |"
    yield f"|---|---{'|---' * len(TWO_BITS)}|"
    for card in CARDS:
        for tokens in FEW_TOKENS:
            times = [1e6 * predict(card, shape, tokens, code).seconds for code in TWO_BITS]
            yield f"| {card.name} | {tokens} | {' | '.join(f'{time:.0f}' for time in times)} |"


def main() -> None:
    """Write the tables and the budget."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    processes = os.cpu_count() or 1
    records = list(static.records(processes=processes))
    spilling = [f"sm_{r['arch']} {r['kernel']}" for r in records if r["spill_bytes"]]
    if spilling:
        sys.exit(f"the page says that nothing spills, but: {', '.join(spilling)}")
    shape = SHAPES["21b"]
    prepare_counts(
        [
            w
            for card in CARDS
            for n in TOKENS
            for code in (*STANDARD, *TWO_BITS)
            for w in wanted(card, shape, n, code)
        ],
        processes,
    )
    for name, rows in sections(records).items():
        fill(PAGE, name, "\n".join(rows))
    fill(DOCS / "codes.md", "decoding", "\n".join(two_bit_rows()))
    BUDGET.write_text(json.dumps(static.new_budget(records), indent=1) + "\n", encoding="utf-8")


def sections(records: list[dict[str, Any]]) -> dict[str, Iterator[str]]:
    """Lines of every table by its name."""
    return {
        "static": static_rows(records),
        "search": search_rows(records),
        "search_rate": rate_rows(),
        "other": other_rows(records),
        "prediction": prediction_rows("21b"),
        "version": iter([f"Triton {triton.__version__}, 21B shapes, tiles of 256 weights."]),
    }


if __name__ == "__main__":
    main()
