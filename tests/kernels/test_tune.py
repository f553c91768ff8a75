"""The search for tile sizes with times that are made up, so that the best table is known."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from erniequant.codes import get_code
from erniequant.errors import ErnieQuantError
from erniequant_kernels import tuning
from erniequant_kernels.bench import tune, tune_card
from erniequant_kernels.bench.problem import SHAPES
from erniequant_kernels.bench.timing import Timer
from erniequant_kernels.bench.tune import Candidate, Problem, candidates
from erniequant_kernels.fused_gemm import FusedGemmConfig
from erniequant_kernels.tuning import FusedTile, PackedTile, Tuning, TuningRow


def same(tile):
    return {2: tile, 3: tile, 4: tile}


# A table of its own, so that tests do not change with the shipped ones.
SHIPPED = Tuning(
    4700,
    (
        TuningRow(0.15, "packed", 8, same(PackedTile(32, 1, 2))),
        TuningRow(1.6, "packed", 8, same(PackedTile(64, 2, 2)) | {3: PackedTile(32, 1, 2)}),
        TuningRow(8, "packed", 8, same(PackedTile(64, 2, 2)) | {3: PackedTile(32, 1, 2)}),
        TuningRow(16, "packed", 16, same(PackedTile(32, 2, 2)) | {3: PackedTile(16, 1, 2)}),
        TuningRow(32, "fused", 32, same(FusedTile(128, 32, 4, 3))),
        TuningRow(64, "fused", 64, same(FusedTile(128, 64, 4, 3))),
        TuningRow(math.inf, "fused", 128, same(FusedTile(128, 64, 4, 3))),
    ),
)
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)


def problems(shapes=("21b",), bits=(2,), tokens=TOKENS):
    return [Problem(s, n, b) for n in tokens for s in shapes for b in bits]


def used(problem, table):
    """The candidate by which a table runs a problem."""
    row = table.rows[table.row(problem.load)]
    return Candidate(row.kernel, row.block_m, row.tiles[problem.bits])


class Card:
    """Times of candidates: a function of problem and candidate, None where it does not run."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, problem, some, rounds):
        times = []
        for table in some:
            candidate = used(problem, table)
            self.asked.append((problem, candidate, rounds))
            times.append(self.seconds(problem, candidate, table))
        return times

    def tried(self, problem):
        return {c for p, c, rounds in self.asked if p == problem and rounds == tune.FEW_ROUNDS}


def distance(candidate, best):
    """How far a candidate is from the best, in doublings of its sizes."""
    a, b = ({"block_m": c.block_m} | vars(c.tile) for c in (candidate, best))
    apart = 0 if candidate.kernel == best.kernel else 3
    return apart + sum(abs(math.log2(a[k] / b[k])) for k in a.keys() & b.keys())


def known_best(problem):
    """Wider row tiles for more tokens, deeper turns for fewer bits."""
    load = problem.load
    if load <= 6:
        return Candidate("packed", 8 if load < 6 else 16, PackedTile(128 // problem.bits, 2, 3))
    block_m = {24: 64, 96: 128, 192: 256}[int(load)]
    return Candidate("fused", block_m, FusedTile(128, 32 if problem.bits == 4 else 64, 8, 2))


def near_known_best(problem, candidate, table):
    return 1e-6 * (100 + problem.tokens) * 1.1 ** distance(candidate, known_best(problem))


def searched(card, wanted, **options):
    return list(tune.search(wanted, SHIPPED, card, **options))


def test_the_known_optimum_is_found():
    card = Card(near_known_best)
    wanted = problems(bits=(2, 4))
    assert all(known_best(p) in candidates(p.load) for p in wanted)
    table = tune.tuned(searched(card, wanted), SHIPPED, card)
    assert [used(p, table) for p in wanted] == [known_best(p) for p in wanted]
    # Between the loads that were searched, and on both sides of them.
    load = 6 / 64
    ends = [r.rows_per_expert for r in table.rows]
    middles = [math.sqrt(a * b) * load for a, b in itertools.pairwise(TOKENS)]
    assert ends == pytest.approx([*middles, math.inf], rel=0.01)
    # Three bits were not searched: a tile of the shipped table, of the same kernel.
    three = {row.kernel: row.tiles[3] for row in SHIPPED.rows}
    assert all(type(row.tiles[3]) is type(three[row.kernel]) for row in table.rows)


def test_the_table_parses_back_and_is_what_the_kernels_then_use(tmp_path, monkeypatch):
    card = Card(near_known_best)
    table = tune.tuned(searched(card, problems()), SHIPPED, card)
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps(tune_card.all_tables("sm_90", table), allow_nan=False))
    monkeypatch.setenv(tuning.TABLE, str(file))
    # Not the cache: others keep the shipped tables.
    found = tuning.tables.__wrapped__()
    assert (found["sm_90"].warps_wanted, found["sm_90"].rows) == (table.warps_wanted, table.rows)
    for name in ("default", "sm_80"):
        assert found[name].rows == tuning.tables()[name].rows


def test_equal_times_give_the_first_candidates():
    tables = []
    for _ in range(2):
        card = Card(lambda *_: 1e-5)
        table = tune.tuned(searched(card, problems(bits=(2, 4))), SHIPPED, card)
        tables.append(tuning.settings_of(table))
        for problem in problems(bits=(2, 4)):
            assert used(problem, table) == candidates(problem.load)[0]
        assert table.warps_wanted == SHIPPED.warps_wanted
    assert tables[0] == tables[1]


def test_what_fails_is_not_tried_again():
    def seconds(problem, candidate, table):
        fails = candidate.tile.stages == 2 or (candidate.block_m == 16 and problem.bits == 4)
        return None if fails else near_known_best(problem, candidate, table)

    card = Card(seconds)
    found = searched(card, problems(bits=(2, 4), tokens=(64, 256)))
    assert all(c.tile.stages == 3 for f in found for c in f.seconds)
    first, second, third, fourth = found
    assert first.failed == first.tried // 2
    # Widths fail apart; of 4 bits no row tile of 16 is left.
    assert {c.block_m for c in third.seconds} == {16, 32, 64, 128}
    assert {c.block_m for c in fourth.seconds} == {32, 64, 128}
    assert not card.tried(third.problem) & (set(card.tried(first.problem)) - set(first.seconds))
    # One row tile for both widths: not the best of 2 bits, which 4 bits do not have.
    assert first.best.block_m == 16
    assert used(first.problem, tune.tuned(found, SHIPPED, card)).block_m == 8


def test_what_is_slow_for_its_row_tile_is_not_tried_at_other_loads():
    def seconds(problem, candidate, table):
        # Row tiles of 32 are slow here, one warp is slow among equals.
        return (9.0 if candidate.block_m == 32 else 1.0) * (2.0 if candidate.tile.warps == 1 else 1)

    card = Card(seconds)
    first, second = problems(tokens=(64, 256))
    searched(card, [first, second])
    assert {c.tile.warps for c in card.tried(first) if c.kernel == "packed"} == {1, 2, 4}
    again = {c for c in card.tried(second) if c.kernel == "packed"}
    assert {c.tile.warps for c in again} == {2, 4}
    assert {c.block_m for c in again} == {16, 32}


def test_those_near_the_best_are_timed_again_together_with_the_shipped_table():
    calls = []
    first, second = candidates(1.5)[:2]

    def measure(problem, some, rounds):
        calls.append((len(some), rounds))
        used_here = [used(problem, table) for table in some]
        if rounds == tune.FEW_ROUNDS:
            return [1.0 if c == first else 1.1 if c == second else 2.0 for c in used_here]
        return [5.0, 1.2, 1.05]

    (found,) = tune.search(problems(tokens=(16,)), SHIPPED, measure)
    assert calls == [(len(candidates(1.5)), tune.FEW_ROUNDS), (3, tune.MANY_ROUNDS)]
    assert found.best == second and found.shipped == 5.0
    assert found.seconds[first] == 1.2 and found.seconds[second] == 1.05


def test_shapes_of_one_load_share_what_costs_least_together():
    # The best of each is bad for the other; the third is a compromise by factors, not by sums.
    a, b, c = candidates(6 / 64)[:3]
    times = {
        "21b": {a: 1.0, b: 1.5, c: 1.2},
        "vl": {a: 0.09, b: 0.03, c: 0.04},
    }

    def seconds(problem, candidate, table):
        return times[problem.shape].get(candidate, 9.0)

    card = Card(seconds)
    found = searched(card, problems(shapes=("21b", "vl"), tokens=(1,)))
    table = tune.tuned(found, SHIPPED, card)
    # Products: a 0.09, b 0.045, c 0.048; sums: a 1.09, b 1.53, c 1.24.
    assert used(found[0].problem, table) == b


def test_where_time_ends_the_shipped_rows_stay():
    times = iter([False, False, True])
    card = Card(near_known_best)
    wanted = problems(tokens=(16, 256, 1))
    found = searched(card, wanted, out_of_time=lambda: next(times))
    assert [f.problem.tokens for f in found] == [16, 256]
    table = tune.with_rows(found, SHIPPED)
    for problem in wanted[:2]:
        assert used(problem, table) == known_best(problem)
    # 1.5 and 24 assignments per expert lie in the rows that end at 1.6 and at 32.
    first, last = (SHIPPED.row(problem.load) for problem in wanted[:2])
    assert (first, last) == (1, 4)
    assert table.rows[:1] == SHIPPED.rows[:1] and table.rows[3:] == SHIPPED.rows[5:]
    assert [row.rows_per_expert for row in table.rows[1:3]] == [6.0, 32.0]
    assert tuning.parse(tuning.settings_of(table)).rows == table.rows


def test_a_card_on_which_nothing_runs():
    card = Card(lambda *_: None)
    found = searched(card, problems(tokens=(1, 16)))
    with pytest.raises(ErnieQuantError, match="nothing was searched that runs"):
        tune.tuned(found, SHIPPED, card)
    with pytest.raises(ErnieQuantError):
        tune.tuned([], SHIPPED, card)
    # A load at which nothing runs does not count as searched.
    mixed = Card(lambda p, c, t: None if p.tokens == 16 else near_known_best(p, c, t))
    table = tune.tuned(searched(mixed, problems(tokens=(1, 16))), SHIPPED, mixed)
    assert used(problems(tokens=(1,))[0], table) == known_best(problems(tokens=(1,))[0])
    assert table.rows[1:] == SHIPPED.rows[1:]


def test_the_number_of_warps_is_chosen_for_the_packed_rows():
    def seconds(problem, candidate, table):
        wanted = table.warps_wanted / SHIPPED.warps_wanted
        if problem.load > 6:  # fused products are not split
            wanted = 1 / wanted
        return near_known_best(problem, candidate, table) * 1.5 ** abs(math.log2(wanted / 2))

    card = Card(seconds)
    table = tune.tuned(searched(card, problems()), SHIPPED, card)
    assert table.warps_wanted == 2 * SHIPPED.warps_wanted


def test_inputs_are_split_as_the_finished_table_splits_them():
    code = tune_card.random_matrices(SHAPES["tiny"], 2, 1, torch.device("meta"))[0].code
    card = Card(near_known_best)
    table = tune.tuned(searched(card, problems()), SHIPPED, card)
    begins = [0.0, *(row.rows_per_expert for row in table.rows)]
    for problem, below in zip(problems(), begins, strict=False):
        alone = known_best(problem).table(below, 2, table.warps_wanted)
        configs = [t.config(t.row(problem.load), code, 3072, 2560, 64, 6) for t in (alone, table)]
        assert configs[0] == configs[1]


def test_a_code_may_have_a_tile_of_its_own():
    # 3072 outputs and 2560 inputs, as above. Only the last row of two says something about cc2s.
    own = FusedTile(128, 32, 8, 2)
    rows = tuple(
        dataclasses.replace(row, named_tiles={"cc2s": own} if row is SHIPPED.rows[-1] else {})
        for row in SHIPPED.rows
    )
    table = tuning.parse(tuning.settings_of(Tuning(SHIPPED.warps_wanted, rows)))
    assert table.rows == rows
    for name in ("cc2", "cc2s", "cc3"):
        *_, before, last = (
            table.config(i, get_code(name, 12), 3072, 2560, 64, 6) for i in range(len(rows))
        )
        wide = FusedTile(128, 64, 4, 3)
        assert before == FusedGemmConfig(64, *vars(wide).values())
        assert last == FusedGemmConfig(128, *vars(own if name == "cc2s" else wide).values())
    # A search for other codes leaves it as it was.
    card = Card(near_known_best)
    found = tune.tuned(searched(card, problems()), table, card)
    kept = [row for row in found.rows if row.kernel == "fused" and row.named_tiles]
    assert kept and all(row.named_tiles == {"cc2s": own} for row in kept)


def test_every_shipped_tile_is_among_the_candidates_or_near_one():
    for load in (6 / 64, 1.5, 6.0, 24.0, 96.0, 192.0):
        row = SHIPPED.rows[SHIPPED.row(load)]
        tried = {c.row_tile for c in candidates(load)}
        assert (row.kernel, row.block_m) in tried, load
    assert all(0 < len(candidates(p.load)) <= 150 for p in problems(("21b", "vl", "300b")))


# One token: the interpreter takes a second a layer.
TINY = Problem("tiny", 1, 2)


def one_row(kernel, block_m, tile):
    return Tuning(8, (TuningRow(math.inf, kernel, block_m, {2: tile}),))


def test_tables_that_fail_or_are_wrong_have_no_time(monkeypatch):
    packed = one_row("packed", 8, PackedTile(32, 1, 2))
    fused = one_row("fused", 16, FusedTile(64, 32, 4, 2))
    broken, off, unfit = (dataclasses.replace(packed) for _ in range(3))
    real = tune_card.moe_experts

    def layer(*arguments):
        if arguments[-1] is broken:
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        out = real(*arguments)
        return 1.2 * out if arguments[-1] is off else out

    monkeypatch.setattr(tune_card, "moe_experts", layer)
    monkeypatch.setattr(tune_card, "TOGETHER", 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(lambda run, _: run, lambda call: 1e-3)
    measure = tune_card.OnCard(packed, timer, device, threads=1)
    # Nothing is compiled in the interpreter.
    monkeypatch.setattr(
        measure, "_compiled", lambda _, some: [table is not unfit for table in some]
    )
    times = measure(TINY, [broken, fused, off, packed, unfit], 3)
    assert times == [None, 1e-3, None, 1e-3, None]
    assert measure.failures == {
        "RuntimeError: Triton Error [CUDA]: invalid argument": 1,
        "wrong": 1,
    }


COMPILING = """
import math, torch
from erniequant_kernels.bench import host
from erniequant_kernels.bench.problem import SHAPES
from erniequant_kernels.bench.tune import Problem
from erniequant_kernels.bench.tune_card import OnCard
from erniequant_kernels.tuning import PackedTile, FusedTile, Tuning, TuningRow

def table(kernel, block_m, tile):
    return Tuning(8, (TuningRow(math.inf, kernel, block_m, {4: tile}),))

good = [table("packed", 8, PackedTile(32, 1, 2)), table("fused", 16, FusedTile(64, 32, 4, 2))]
nonsense = table("packed", 8, PackedTile(32, 3, 2))  # no power of two
with host.mocked_driver(90) as driver:
    driver.keeping = True
    measure = OnCard(good[0], None, torch.device("cpu"), threads=2)
    some = [*good, nonsense]
    first = measure._compiled(Problem("tiny", 3, 4), some)
    # Each has other kernels of its own, whose turns are longer; those between are the same.
    some = [table("packed", 8, PackedTile(64, 1, 2)), table("fused", 16, FusedTile(64, 64, 4, 2))]
    driver.utils.load_binary = lambda name, *_: (0, 1, 255, 4 * ("packed" in name), 1024)
    print(first, measure._compiled(Problem("tiny", 3, 4), some), driver.launches)
    assert measure.failures["spills"] == 1
    assert measure.failures["AssertionError: num_warps must be a power of 2"] == 1
"""


def test_candidates_are_compiled_on_threads_and_those_that_spill_are_dropped(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[True, True, False] [False, True] []"
