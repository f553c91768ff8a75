"""Count the kernels' machine code again and write the tables of docs/performance.md.

Run from the repository root: ``python docs/update_performance.py``; needs no GPU.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from update_readme import replace_section

from erniequant.codes import register_length
from erniequant_kernels import static
from erniequant_kernels.bench.problem import SHAPES, Shape, make_batch
from erniequant_kernels.tuning import Tuning, tables

PAGE = Path(__file__).with_name("performance.md")
BUDGET = Path(static.__file__).with_name("budget.json")
STANDARD = {bits: f"cc{bits} L{register_length(bits, 'standard')}" for bits in (2, 3, 4)}
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)
REACHED = 0.9  # of the specified memory bandwidth, by a large copy
GEMM_REACHED = 0.7  # of the matrix units' peak, by a large product
LAUNCH = 2e-6  # seconds between kernels of a CUDA graph
LAUNCHES = 5  # of either kind


@dataclass(frozen=True)
class Card:
    """What a card can do.

    Attributes:
        arch: whose machine code and tuning table are used; Ada runs the code of sm_80.
        gigabytes: memory bandwidth in GB/s, as specified.
        mma: bf16 multiply-adds per clock and multiprocessor of the warp-wide matrix instruction
            with float32 sums, and ``peak``: of the fastest one.
    """

    name: str
    arch: int
    multiprocessors: int
    gigahertz: float
    gigabytes: float
    mma: float
    peak: float

    @property
    def clocks(self) -> float:
        """Multiprocessor clocks per second, all together."""
        return self.multiprocessors * self.gigahertz * 1e9

    @property
    def bytes_per_second(self) -> float:
        """Memory bandwidth that a kernel can reach."""
        return REACHED * self.gigabytes * 1e9


# Specified figures; Hopper's warp-wide instruction reaches about five eighths of the peak of the
# warp-group-wide one in published micro-benchmarks.
CARDS = (
    Card("RTX 4090", 80, 128, 2.52, 1008, 256, 256),
    Card("A100 80 GB", 80, 108, 1.41, 2039, 1024, 1024),
    Card("H100 SXM", 90, 132, 1.755, 3350, 1280, 2048),
    Card("H200", 90, 132, 1.755, 4800, 1280, 2048),
)


def loads(shape: Shape, tokens: int) -> torch.Tensor:
    """Assignments per expert of the benchmark's batch."""
    index = make_batch(
        Shape(1, 1, shape.experts, shape.top_k), tokens, torch.device("cpu")
    ).expert_index
    return torch.bincount(index.flatten(), minlength=shape.experts)


def packed_seconds(
    card: Card, shape: Shape, tokens: int, bits: int, costs: Mapping[str, float], tuning: Tuning
) -> tuple[float, str]:
    """Predicted time of a layer on packed weights, and what bounds it."""
    counts = loads(shape, tokens)
    row = tuning.packed_row(tokens * shape.top_k / shape.experts, {bits})
    weights = shape.weights_per_expert
    if row is None:
        return _decode_once_seconds(card, shape, tokens, bits, costs)
    tiles = int((-(-counts // row.block_m)).sum())
    cost = costs[f"packed_gemm {STANDARD[bits]} M{row.block_m}"]
    parts = {
        "memory": int((counts > 0).sum()) * weights * bits / 8 / card.bytes_per_second,
        "issue": tiles * weights * cost / (card.clocks * 4 * 32),
        "matrix": tiles * weights * 2 * row.block_m / (card.clocks * card.mma),
    }
    bound = max(parts, key=lambda name: parts[name])
    return parts[bound] + LAUNCHES * LAUNCH, bound


def _decode_once_seconds(
    card: Card, shape: Shape, tokens: int, bits: int, costs: Mapping[str, float]
) -> tuple[float, str]:
    weights = shape.experts * shape.weights_per_expert
    decode = weights * costs[f"expand {STANDARD[bits]}"] / (card.clocks * 4 * 32)
    traffic = 2 * 2 * weights / card.bytes_per_second  # decoded weights, written and read once
    # The next experts are decoded while the last are multiplied.
    parts = {"decode once": max(decode, traffic), "product": _gemm_seconds(card, shape, tokens)}
    bound = max(parts, key=lambda name: parts[name])
    return parts[bound] + chunks(card, shape) * LAUNCH, bound


def chunks(card: Card, shape: Shape) -> int:
    """Times that a few experts are decoded and multiplied, for both projections."""
    tuning = tables()[f"sm_{card.arch}"]
    matrices = ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
    return sum(-(-shape.experts // tuning.experts_at_once(*matrix)) for matrix in matrices)


def _gemm_seconds(card: Card, shape: Shape, tokens: int) -> float:
    work = tokens * shape.top_k * shape.weights_per_expert
    return work / (card.clocks * card.peak * GEMM_REACHED)


def bf16_seconds(card: Card, shape: Shape, tokens: int) -> float:
    """Predicted time of a layer in bfloat16: memory or matrix units, whichever takes longer."""
    active = int((loads(shape, tokens) > 0).sum())
    memory = active * shape.weights_per_expert * 2 / card.bytes_per_second
    return max(memory, _gemm_seconds(card, shape, tokens)) + LAUNCHES * LAUNCH


def static_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """The kernels that decode."""
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
    """The kernels that do not."""
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
    """Microseconds a layer of 21B, and how many times faster than bf16."""
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
    records = list(static.records())
    spilling = [f"sm_{r['arch']} {r['kernel']}" for r in records if r["spill_bytes"]]
    if spilling:
        sys.exit(f"the page says that nothing spills, but: {', '.join(spilling)}")
    page = PAGE.read_text(encoding="utf-8")
    sections = {
        "static": static_rows(records),
        "other": other_rows(records),
        "prediction": prediction_rows(records),
        "version": iter([f"Triton {triton.__version__}, 21B shapes, tiles of 256 weights."]),
    }
    for name, rows in sections.items():
        page = replace_section(page, name, "\n".join(rows))
    PAGE.write_text(page, encoding="utf-8")
    BUDGET.write_text(json.dumps(static.new_budget(records), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
