"""Measured times beside those that docs/performance.md predicts, and where these are most wrong."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS
from erniequant_kernels.bench.problem import BFLOAT16_BITS

PAGE = DOCS / "performance.md"
SHAPE = "21b"
"""The shape that the page predicts."""

WORST = 3

Key = tuple[int, int]
"""Tokens and bits; 16 bits are the fastest bfloat16 method."""


@dataclass(frozen=True)
class Comparison:
    """One batch: microseconds predicted and measured, and the error relative to the measured."""

    tokens: int
    bits: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Above zero where the prediction is too slow."""
        return self.predicted / self.measured - 1


def compare(measured: Mapping[Key, float], predicted: Mapping[Key, float]) -> list[Comparison]:
    """Everything that was both measured and predicted, by tokens and bits."""
    both = sorted(measured.keys() & predicted.keys())
    return [Comparison(*key, predicted[key], measured[key]) for key in both]


def worst(compared: Sequence[Comparison], count: int = WORST) -> list[Comparison]:
    """The largest errors, as a factor in either direction: half the time is as wrong as double."""
    return sorted(compared, key=lambda c: -max(c.predicted / c.measured, c.measured / c.predicted))[
        :count
    ]


def fastest(rows: Sequence[Mapping[str, Any]]) -> dict[Key, float]:
    """Measured microseconds of the shape that is predicted, from rows of the benchmark."""
    best: dict[Key, float] = {}
    for row in rows:
        if row["shape"] == SHAPE and row["microseconds"] is not None:
            key = (row["tokens"], row["bits"])
            best[key] = min(row["microseconds"], best.get(key, row["microseconds"]))
    return best


def predictions(card: str, page: Path = PAGE) -> dict[Key, float]:
    """The page's microseconds for a card by the name that its driver gives; none if it is not in
    the table."""
    section = page.read_text("utf-8").partition("<!-- prediction:begin -->")[2]
    lines = section.partition("<!-- prediction:end -->")[0].strip().splitlines()
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    bits = {name: _bits(name) for name in heading}
    found = {}
    for row in rows:
        cells = dict(zip(heading, row, strict=True))
        if not _same_card(cells["card"], card):
            continue
        for name, width in bits.items():
            number = re.match(r"[\d.]+", cells[name])
            if width is not None and number:
                found[int(cells["tokens"]), width] = float(number[0])
    return found


def _bits(heading: str) -> int | None:
    if heading == "bf16":
        return BFLOAT16_BITS
    match = re.fullmatch(r"(\d) bits", heading)
    return int(match[1]) if match else None


def _same_card(row: str, card: str) -> bool:
    """The page's "H100 SXM" is the driver's "NVIDIA H100 80GB HBM3", not its "NVIDIA H100 PCIe"."""
    model = re.match(r"(RTX )?[A-Z]?\d{3,4}", row)
    names = re.sub(r"[-_]", " ", card).split()
    return model is not None and set(model[0].split()) <= set(names) and "PCIe" not in names


def table(compared: Sequence[Comparison]) -> str:
    """Lines for a terminal."""
    lines = [f"{'tokens':>6}{'bits':>6}{'measured us':>13}{'predicted':>11}{'error':>8}"]
    lines += [
        f"{c.tokens:6}{c.bits:6}{c.measured:13.1f}{c.predicted:11.1f}{100 * c.error:+7.0f} %"
        for c in compared
    ]
    return "\n".join(lines)
