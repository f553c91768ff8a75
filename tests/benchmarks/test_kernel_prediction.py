"""The model behind predicted times: placement on one multiprocessor, loads, and what binds."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import prediction
from benchmarks.kernels.cards import CARDS
from benchmarks.kernels.load import even_load, load
from benchmarks.kernels.placement import ALONE, Work, ideal, makespan
from erniequant.codes import get_code
from erniequant_kernels.bench.problem import SHAPES, Shape
from erniequant_kernels.fused_gemm import FusedGemmConfig
from erniequant_kernels.machine_code import KernelCost
from erniequant_kernels.machine_traffic import Counted
from erniequant_kernels.packed_gemm import PackedGemmConfig
from erniequant_kernels.ptx.accesses import EPILOGUE, LOOP, PROLOGUE, Totals

H100 = next(card for card in CARDS if "H100" in card.name)
ISSUE = Work(warps=1, issue=1000.0, shared=0.0, least=0.0, wait=0.0)


@pytest.mark.parametrize(
    "programs, resident, expected",
    [
        (1, 8, ALONE * 1000),  # alone on a scheduler: every second clock
        (4, 8, ALONE * 1000),  # one on each scheduler
        (8, 8, 2000),  # two on each: all clocks are used
        (16, 16, 4000),
        (8, 4, 2 * ALONE * 1000),  # two waves, of which each leaves every second clock empty
        # Five on four schedulers: one has two, both at half its rate, like the others alone.
        (5, 8, ALONE * 1000),
        (9, 16, 3000),  # one scheduler has three
    ],
)
def test_warps_share_their_schedulers(programs, resident, expected):
    assert makespan(programs, 1, resident, ISSUE) == pytest.approx(expected)


def test_programs_are_shared_out_over_multiprocessors():
    # 17 on 2: one multiprocessor has 9.
    assert makespan(17, 2, 16, ISSUE) == pytest.approx(makespan(9, 1, 16, ISSUE))
    assert ideal(17, 2, ISSUE) == pytest.approx(17 / 2 * 1000 / 4)


def test_a_wait_hides_behind_other_programs():
    waiting = replace(ISSUE, wait=1500.0)
    # Alone it is added once a wave; with two waves at a time it is hidden but for the first.
    assert makespan(4, 1, 4, waiting) == pytest.approx(1500 + ALONE * 1000)
    alone, together = (makespan(64, 1, resident, waiting) for resident in (4, 16))
    assert alone == pytest.approx(16 * (1500 + ALONE * 1000))
    assert together < 0.6 * alone


def test_shared_pipes_and_latencies_bound_the_rate():
    pipe = replace(ISSUE, shared=900.0)  # nine tenths of a multiprocessor's clocks each
    assert makespan(8, 1, 8, pipe) == pytest.approx(8 * 900)
    slow = replace(ISSUE, least=5000.0)
    assert makespan(8, 1, 8, slow) == pytest.approx(5000)
    wide = Work(warps=4, issue=1000.0, shared=0.0, least=0.0, wait=0.0)
    assert makespan(2, 1, 2, wide) == pytest.approx(2000)


def test_residency_follows_from_the_scarcest_resource():
    # 65536 registers: 8 programs of one warp with 255 (256 a lane) registers, 65536 / (256 * 32).
    assert H100.resident(255, 1, 0) == 8
    assert H100.resident(128, 4, 0) == 4
    assert H100.resident(32, 1, 100 << 10) == 2  # 228 KiB, 1 KiB beside each
    assert H100.resident(32, 1, 0) == 32
    assert H100.resident(32, 8, 0) == 8  # 64 warps
    rtx = next(card for card in CARDS if "4090" in card.name)
    assert rtx.resident(32, 2, 0) == 24


def test_loads_are_those_of_tokens_that_choose_different_experts():
    shape = SHAPES["21b"]
    one = load(shape, 1)
    assert one.active == 6 and one.row_tiles(8) == 6  # no expert twice
    many = load(shape, 64)
    assert (many.counts.sum(1) == 384).all() and many.counts.max() <= 64
    assert load(shape, 64, exponent=0.0).row_tiles(8) == 72
    assert many.row_tiles(8) == 75
    assert even_load(shape, 64).row_tiles(8) == 64
    assert torch.equal(even_load(shape, 2).counts.sum(), torch.tensor(12))


def test_popular_experts_get_more():
    counts = load(SHAPES["21b"], 1024).counts.float().mean(0)
    assert counts[0] > 2 * counts[-16:].mean()
    even = load(SHAPES["21b"], 1024, exponent=0.0).counts.float().mean(0)
    assert even.max() < 1.2 * even.min()


SECTION = Totals(*[0.0] * 10)


def counts(**changes):
    """A kernel of 1000 issue slots a turn and nothing else."""
    cost = KernelCost(
        arch=90, looped=True, instructions=1000, alu=0, multiply=0, memory=0, matrix=0,
        matrix_opcode="HMMA", registers=128, spill_bytes=0, shared_bytes=8192,
        weights_per_lane=512.0, opcodes={}, once=0,
    )  # fmt: skip
    sections = dict.fromkeys((PROLOGUE, LOOP, EPILOGUE), SECTION) | changes.pop("sections", {})
    cost = replace(cost, **changes.pop("cost", {}))
    base = {
        "cost": cost, "accesses": (), "sections": sections, "warps": 1, "weights": 64 * 16 * 64,
        "executed": 0, "outside": 0, "matrices": (),
    }  # fmt: skip
    return Counted(**(base | changes))


SHAPE = Shape(2560, 1536, 64, 6)
CODE = get_code("cc2", 12)
CONFIG = PackedGemmConfig(block_m=8, block_k=64, splits=2, warps=1, stages=2)


def predicted(monkeypatch, what, tokens=64, config=CONFIG, card=H100, **options):
    monkeypatch.setattr(prediction, "counted", lambda wanted: what)
    return prediction.product(card, SHAPE, tokens, CODE, config, down=False, **options)


def test_a_product_of_instructions_takes_their_time(monkeypatch):
    time = predicted(monkeypatch, counts(), spread=even_load(SHAPE, 64))
    # 64 row tiles, 3072 outputs in programs of 16 groups of 16, two splits of 20 turns.
    assert time.programs == 64 * 12 * 2
    perfect = time.programs * 20 * 1000 / 4 / H100.multiprocessors / H100.clock
    assert time.parts["issue"] == pytest.approx(perfect)
    assert time.seconds >= perfect + prediction.LAUNCH
    assert time.bound == "memory"  # 2 bits of all weights take longer still


@pytest.mark.parametrize(
    "what, bound",
    [
        ({"sections": {LOOP: replace(SECTION, clocks=1500.0)}}, "level 1"),
        ({"sections": {LOOP: replace(SECTION, read_bytes=2e5)}}, "level 2"),
        ({"matrices": ((16, 8, 16),) * 2000}, "matrix"),
        ({"cost": {"instructions": 10}}, "memory"),
    ],
)
def test_the_largest_part_binds(monkeypatch, what, bound):
    time = predicted(monkeypatch, counts(**what), spread=even_load(SHAPE, 64))
    assert max(time.parts, key=lambda part: time.parts[part]) == bound
    if bound != "memory":  # whose kernel is too small for anything but waiting
        assert time.bound == bound


def test_rows_without_a_token_are_not_stored(monkeypatch):
    stored = {EPILOGUE: replace(SECTION, clocks=8000.0, store_clocks=8000.0, written_bytes=8e4)}
    full = predicted(monkeypatch, counts(sections=stored), spread=even_load(SHAPE, 64), tokens=64)
    # As many row tiles, but 6 assignments of 8: three quarters of the rows.
    fewer = predicted(monkeypatch, counts(sections=stored), spread=even_load(SHAPE, 64), tokens=48)
    assert full.parts["level 1"] * 0.75 * 64 / 48 == pytest.approx(
        fewer.parts["level 1"] * 64 / 48, rel=1e-6
    )


def test_narrow_group_wide_products_are_no_faster(monkeypatch):
    clocks = {}
    for columns in (16, 64, 128):
        what = counts(matrices=((64, columns, 16),), warps=4)
        config = FusedGemmConfig(64, 128, 64, 4, 2)
        clocks[columns] = predicted(monkeypatch, what, config=config).parts["matrix"]
    assert clocks[16] == clocks[64] == pytest.approx(clocks[128] / 2)


def test_bfloat16_reads_the_weights_of_active_experts():
    shape = SHAPES["21b"]
    one = prediction.bf16(H100, shape, 1)
    read = 6 * shape.weights_per_expert * 2 / H100.bytes_per_second
    assert read < one.seconds < read + 5 * prediction.LAUNCH + 10e-6
    # With many tokens the matrix units bind, at seven tenths of their peak.
    many = prediction.bf16(H100, shape, 16384)
    work = 16384 * 6 * shape.weights_per_expert
    peak = H100.multiprocessors * H100.clock * H100.peak
    assert many.seconds > work / (0.7 * peak)
    assert many.bound == "matrix"
