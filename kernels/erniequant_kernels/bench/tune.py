"""Search for tile sizes: candidates for every batch, times of them all, the table of the best.

What is timed is always a whole layer under a whole table, so a time includes what the choice costs
elsewhere. Equal times give equal tables: candidates have an order, and the first of the best wins.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from erniequant.errors import ErnieQuantError
from erniequant_kernels.bench.problem import SHAPES
from erniequant_kernels.tuning import FusedTile, PackedTile, Tuning, TuningRow

TOKENS = (1, 16, 64, 2048, 4, 256, 1024)
"""Most telling first: time may run out."""

FEW_ROUNDS, MANY_ROUNDS = 3, 20
"""For every candidate, and for those that are near the best by these."""

NEAR, FINALISTS = 1.15, 5
SLOW = 1.5
"""A candidate that is so many times slower than the best of its kernel and row tile at some load is
not tried at others: load changes which row tile is best more than which tile belongs to it."""

WARPS_FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)
"""Of the table's `warps_wanted`, tried once the rows are chosen."""

Kernel = Literal["packed", "fused"]
Seconds = float | None
Measure = Callable[["Problem", Sequence[Tuning], int], Sequence[Seconds]]
"""Seconds of a layer under each of some tables, medians over so many rounds; None where it does not
run, is wrong, or spills registers."""


@dataclass(frozen=True)
class Problem:
    """A layer of some shape at some width, and a batch."""

    shape: str
    tokens: int
    bits: int

    @property
    def load(self) -> float:
        """Assignments per expert, by which a table chooses."""
        shape = SHAPES[self.shape]
        return self.tokens * shape.top_k / shape.experts


@dataclass(frozen=True)
class Candidate:
    """What a row of a table says about one width."""

    kernel: Kernel
    block_m: int
    tile: PackedTile | FusedTile

    @property
    def row_tile(self) -> tuple[Kernel, int]:
        """What all widths of a row have in common."""
        return self.kernel, self.block_m

    def table(self, below: float, bits: int, warps_wanted: int) -> Tuning:
        """A table with this candidate for loads above ``below``, by which inputs are split."""
        row = TuningRow(math.inf, self.kernel, self.block_m, {bits: self.tile})
        rows = (replace(row, rows_per_expert=below), row) if below else (row,)
        return Tuning(warps_wanted, rows)


@dataclass(frozen=True)
class Found:
    """The times of one problem.

    Attributes:
        seconds: of the candidates that were timed, those near the best over more rounds.
        shipped: of the table that is searched from.
        tried, failed: numbers of candidates.
    """

    problem: Problem
    seconds: Mapping[Candidate, float]
    shipped: Seconds
    tried: int
    failed: int

    @property
    def best(self) -> Candidate:
        """The fastest candidate."""
        return min(self.seconds, key=lambda c: self.seconds[c])


def candidates(load: float) -> list[Candidate]:
    """All that are tried for some assignments per expert, in their order."""
    return [c for c in _all_candidates() if _suits(c, load)]


def _all_candidates() -> Iterator[Candidate]:
    for block_m, block_k, warps, stages in product(
        (8, 16, 32), (16, 32, 64, 128), (1, 2, 4), (2, 3)
    ):
        yield Candidate("packed", block_m, PackedTile(block_k, warps, stages))
    for block_m, block_n, block_k, stages in product(
        (16, 32, 64, 128, 256), (64, 128, 256), (32, 64), (2, 3)
    ):
        # Accumulators take so many registers of a lane, of 255; fewer leave lanes idle.
        for warps in (4, 8):
            if 16 <= block_m * block_n / (32 * warps) <= 128:
                yield Candidate("fused", block_m, FusedTile(block_n, block_k, warps, stages))


def _suits(candidate: Candidate, load: float) -> bool:
    """Whether a row tile is neither nearly empty nor one of many that decode the same weights."""
    block_m, per_tile = candidate.block_m, 2 if candidate.kernel == "packed" else 4
    return block_m <= 8 * max(load, 1.0) and (load <= per_tile * block_m or block_m >= 128)


def boundaries(loads: Sequence[float]) -> list[float]:
    """Where the row for each of some rising loads ends: half-way to the next, the last nowhere."""
    between = [math.sqrt(a * b) for a, b in zip(loads, loads[1:], strict=False)]
    return [float(f"{load:.3g}") for load in between] + [math.inf]


def search(
    problems: Sequence[Problem], shipped: Tuning, measure: Measure,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[Found]:  # fmt: skip
    """Time the candidates of each problem, until there is no time for another.

    Args:
        problems: in the order in which they are searched.
    """
    loads = sorted({problem.load for problem in problems})
    first = shipped.row(loads[0])
    least = shipped.rows[first - 1].rows_per_expert if first else 0.0
    begins = dict(zip(loads, [least, *boundaries(loads)], strict=False))
    dropped: dict[tuple[str, int], set[Candidate]] = {}
    for problem in problems:
        if out_of_time():
            return
        out = dropped.setdefault((problem.shape, problem.bits), set())
        found = _search_one(problem, begins[problem.load], shipped, measure, out)
        out |= _slow(found.seconds)
        yield found


def _search_one(
    problem: Problem, below: float, shipped: Tuning, measure: Measure, out: set[Candidate]
) -> Found:
    """Adds those that fail to ``out``."""
    tried = [c for c in candidates(problem.load) if c not in out]
    tables = {c: c.table(below, problem.bits, shipped.warps_wanted) for c in tried}
    times = measure(problem, list(tables.values()), FEW_ROUNDS)
    seconds = {c: time for c, time in zip(tried, times, strict=True) if time is not None}
    out |= set(tried) - set(seconds)
    best = min(seconds.values(), default=0.0)
    near = sorted((c for c in seconds if seconds[c] <= NEAR * best), key=lambda c: seconds[c])
    last = [shipped, *(tables[c] for c in near[:FINALISTS])]
    reference, *again = measure(problem, last, MANY_ROUNDS)
    for candidate, time in zip(near, again, strict=False):
        if time is not None:
            seconds[candidate] = time
    return Found(problem, seconds, reference, len(tried), len(tried) - len(seconds))


def _slow(seconds: Mapping[Candidate, float]) -> set[Candidate]:
    best: dict[tuple[Kernel, int], float] = {}
    for candidate, time in seconds.items():
        best[candidate.row_tile] = min(time, best.get(candidate.row_tile, time))
    return {c for c, time in seconds.items() if time > SLOW * best[c.row_tile]}


def rows_of(found: Sequence[Found], shipped: Tuning) -> tuple[TuningRow, ...]:
    """For each load that was searched the kernel and the row tile that cost least over all shapes
    and widths, with the best tile of each width; of widths and names that were not searched a
    shipped one.
    Shipped rows for less or more than all loads that were searched stay.

    Cost is the logarithm of the time, so a layer counts as much whether it takes long or not.
    """
    new = {}
    for load in sorted({f.problem.load for f in found}):
        row = _row([f for f in found if f.problem.load == load], load, shipped)
        if row is not None:
            new[load] = row
    first, last = (shipped.row(load) for load in (min(new), max(new)))
    ends = [*boundaries(list(new))[:-1], shipped.rows[last].rows_per_expert]
    searched = [
        replace(row, rows_per_expert=end) for row, end in zip(new.values(), ends, strict=True)
    ]
    return (*shipped.rows[:first], *searched, *shipped.rows[last + 1 :])


def _row(here: Sequence[Found], load: float, shipped: Tuning) -> TuningRow | None:
    """The best row for one load; None if there is no row tile that runs for all."""
    choices = {
        row_tile: _tiles(row_tile, here)
        for row_tile in dict.fromkeys(c.row_tile for f in here for c in f.seconds)
    }
    complete = {row_tile: choice for row_tile, choice in choices.items() if choice is not None}
    if not complete:
        return None
    (kernel, block_m), (_, tiles) = min(complete.items(), key=lambda item: item[1][0])
    tiles |= {
        bits: borrowed(shipped, kernel, load, bits) for bits in (2, 3, 4) if bits not in tiles
    }
    nearest = _nearest(shipped, kernel, load)
    named = nearest.named_tiles if nearest else {}
    return TuningRow(math.inf, kernel, block_m, dict(sorted(tiles.items())), named_tiles=named)


Tiles = dict[int, PackedTile | FusedTile]


def _tiles(row_tile: tuple[Kernel, int], here: Sequence[Found]) -> tuple[float, Tiles] | None:
    """Cost of a row tile, and its tile for each width; None if there is none that runs in all
    shapes."""
    total, tiles = 0.0, {}
    for bits in dict.fromkeys(f.problem.bits for f in here):
        same = [f for f in here if f.problem.bits == bits]
        shared = [
            c for c in same[0].seconds
            if c.row_tile == row_tile and all(c in f.seconds for f in same)
        ]  # fmt: skip
        if not shared:
            return None
        costs = {c: sum(math.log(f.seconds[c]) for f in same) for c in shared}
        best = min(shared, key=lambda c: costs[c])
        total += costs[best]
        tiles[bits] = best.tile
    return total, tiles


def borrowed(shipped: Tuning, kernel: Kernel, load: float, bits: int) -> PackedTile | FusedTile:
    """The tile of a table's row for a load, or of the nearest row with the same kernel."""
    nearest = _nearest(shipped, kernel, load)
    if nearest is None:
        raise ErnieQuantError(f"search {bits} bits too: the table has no {kernel} row to borrow")
    return nearest.tiles[bits]


def _nearest(shipped: Tuning, kernel: Kernel, load: float) -> TuningRow | None:
    at = shipped.row(load)
    same = [i for i, row in enumerate(shipped.rows) if row.kernel == kernel]
    return shipped.rows[min(same, key=lambda i: abs(i - at))] if same else None


def with_rows(found: Sequence[Found], shipped: Tuning) -> Tuning:
    """The table of the best rows.

    Raises:
        ErnieQuantError: nothing that was searched runs.
    """
    if not any(f.seconds for f in found):
        raise ErnieQuantError("nothing was searched that runs here; allow more time")
    return Tuning(shipped.warps_wanted, rows_of(found, shipped))


def tuned(found: Sequence[Found], shipped: Tuning, measure: Measure) -> Tuning:
    """The same, with the number of warps that suits its packed products best.

    Raises:
        ErnieQuantError: see `with_rows`.
    """
    table = with_rows(found, shipped)
    factors = (max(1, round(shipped.warps_wanted * factor)) for factor in WARPS_FACTORS)
    choices = [Tuning(warps, table.rows) for warps in factors]
    costs = [0.0] * len(choices)
    for problem in (f.problem for f in found):
        if table.rows[table.row(problem.load)].kernel == "packed":
            for i, time in enumerate(measure(problem, choices, MANY_ROUNDS)):
                costs[i] += math.inf if time is None else math.log(time)
    return choices[costs.index(min(costs))]
