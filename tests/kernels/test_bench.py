"""The benchmark without a GPU: every method computes the layer, figures follow from times."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from erniequant_kernels.bench import problem, run, timing
from erniequant_kernels.bench import rows as results
from erniequant_kernels.bench.methods import baselines, methods, packed, packed_wint2
from erniequant_kernels.bench.plot import curves, save_plot
from erniequant_kernels.bench.problem import (
    SHAPES,
    Shape,
    bytes_read,
    dense_experts,
    make_batch,
    random_wint2,
)
from erniequant_kernels.bench.rounds import order, rounds, summarize
from erniequant_kernels.bench.timing import Timer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def as_it_is(call, capturable):
    return call


def constant(call):
    call()
    return 1e-3


class SlowingClock:
    """Each call takes as many milliseconds as the number of its round, of so many calls."""

    def __init__(self, calls):
        self.calls, self.called = calls, 0

    def __call__(self, call):
        self.called += 1
        return 1e-3 * ((self.called - 1) // self.calls + 1)


FAKE = Timer(as_it_is, constant)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(run, "ROUNDS", 3)


@pytest.fixture(scope="module")
def found():
    # Tokens below and above the first crossover of the default table (6 rows per expert).
    timer = Timer(as_it_is, lambda call: 1e-3)
    return list(run.measure(["tiny"], [3, 20], [2, 4], DEVICE, timer, 1e9))


@pytest.fixture(scope="module")
def rows(found):
    return [row for result in found for row in result.rows]


@pytest.fixture(scope="module")
def rivals():
    shape = SHAPES["tiny"]
    return baselines(dense_experts(shape, packed(shape, 2, DEVICE).weight, DEVICE))


def test_every_method_ran_and_computes_the_layer(rows, rivals):
    assert {r.method for r in rows} == {
        "erniequant 2 bits", "erniequant 4 bits", *(m.name for m in rivals)
    }  # fmt: skip
    assert [r.method for r in rows if r.reason] == []
    assert results.wrong(rows) == []


def test_every_method_is_measured_once_per_batch(rows):
    keys = [(r.tokens, r.method) for r in rows]
    assert len(set(keys)) == len(keys)


def test_rates_follow_from_bytes_and_times(rows):
    # tiny: 4 experts of 3 * 128 * 64 weights, all chosen by 20 tokens; scales of 256 outputs.
    row = next(r for r in rows if r.tokens == 20 and r.bits == 2)
    weights = 4 * 3 * 128 * 64 // 4
    expected = weights + 4 * 2 * 256 + 2 * 20 * 128 * 2
    assert row.microseconds == pytest.approx(1000)
    assert row.gigabytes_per_second == pytest.approx(expected / 1e-3 / 1e9)
    assert row.memory_limit_percent == pytest.approx(100 * expected / 1e-3 / 1e9)


def test_ratios_are_taken_round_by_round(rivals):
    # A card that gets slower: every call of round n takes n milliseconds.
    ours = [packed(SHAPES["tiny"], bits, DEVICE) for bits in (2, 4)]
    timer = Timer(as_it_is, SlowingClock(calls=3))
    found = run.measure_batch("tiny", [*ours, rivals[0]], 1, DEVICE, timer, 1e9)
    assert [(r.method, r.rival) for r in found.ratios] == [(m.name, rivals[0].name) for m in ours]
    for ratio in found.ratios:
        assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1, 1, 1))
        assert ratio.rounds == 3
    assert found.rows[0].microseconds == pytest.approx(2e3)


def test_only_active_experts_count():
    shape = SHAPES["21b"]
    batch = make_batch(shape, 1, torch.device("cpu"))
    assert batch.active_experts == 6
    weights = 6 * 3 * 2560 * 1536
    assert bytes_read(shape, batch, 16) == 2 * weights + 2 * 2560 * 2


def row(method, bits, microseconds, **changes):
    return results.Row("tiny", 4, method, bits, microseconds, **changes)


def test_above_one_ours_is_faster():
    rows = [row("ours", 2, 2.0), row("theirs", 16, 4.0)]
    (ratio,) = results.ratios(rows, [[1.0, 2.0, 4.0], [3.0, 6.0, 4.0]])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 3.0, 3.0)
    assert (ratio.method, ratio.rival, ratio.tokens) == ("ours", "theirs", 4)


def test_the_comparison_that_counts_is_with_the_fastest_rival():
    rows = [row("ours", 2, 10.0), row("slow", 16, 90.0), row("fast", 16, 25.0)]
    compared = results.ratios(rows, [[10.0] * 2, [90.0] * 2, [25.0] * 2])
    rows.append(row("broken", 16, None, reason="no"))
    (best,) = results.against_the_fastest(rows, compared)
    assert (best.rival, best.median) == ("fast", 2.5)
    assert curves(rows, "tiny") == {"ours": [(4, 10.0)], "bf16, fastest": [(4, 25.0)]}


def test_a_wrong_result_is_named():
    assert "off by 0.5000" in results.wrong([row("ours", 2, 1.0, error=0.5)])[0]
    assert results.wrong([row("ours", 2, 1.0, error=float("nan"))])
    assert results.wrong([row("ours", 2, 1.0, error=0.001)]) == []


def test_a_wrong_product_is_found():
    ours = packed(SHAPES["tiny"], 2, DEVICE)
    broken = dataclasses.replace(ours, prepare=lambda batch: lambda: 1.1 * ours.prepare(batch)())
    found = run.measure_batch("tiny", [broken], 3, DEVICE, FAKE, 1e9)
    assert results.wrong(found.rows)


def test_a_failing_rival_is_reported_and_a_failure_of_ours_is_not_hidden(rivals):
    def failing(call, capturable):
        raise RuntimeError("no kernel image")

    def others(call, capturable):
        return failing(call, capturable) if capturable else call

    # The eager loop of transformers is the one that cannot be captured.
    (eager,) = (method for method in rivals if not method.capturable)
    timer = Timer(others, constant)
    found = run.measure_batch("tiny", [rivals[0], eager], 1, DEVICE, timer, 1e9)
    broken, running = found.rows
    assert broken.microseconds is None and broken.reason == "no kernel image"
    assert running.microseconds == pytest.approx(1000)
    with pytest.raises(RuntimeError, match="no kernel image"):
        run.measure_batch(
            "tiny", methods(SHAPES["tiny"], [2], DEVICE), 1, DEVICE, Timer(failing, constant), 1e9
        )


def test_the_spread_leaves_out_a_tenth_at_each_end():
    time = summarize([float(n) for n in range(20, 0, -1)])
    assert (time.median, time.low, time.high) == (10.5, 3.0, 18.0)


def test_everybody_has_a_turn_after_everybody_else():
    turns = [order(4, turn) for turn in range(60)]
    assert all(sorted(there) == [0, 1, 2, 3] for there in turns)
    assert {pair for there in turns for pair in itertools.pairwise(there)} == set(
        itertools.permutations(range(4), 2)
    )


def test_times_belong_to_their_calls():
    called = []
    calls = [lambda name=name: called.append(name) or name for name in (1.0, 2.0, 3.0)]
    assert rounds(calls, 4, lambda call: call()) == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert sorted(called) == [1.0] * 4 + [2.0] * 4 + [3.0] * 4 and called[:6] != [1.0, 2.0, 3.0] * 2


def test_a_flush_reads_its_buffer_and_leaves_it_as_it_is(monkeypatch):
    # A write of the buffer would still be under way to memory while the next call is timed.
    buffer = torch.arange(10, dtype=torch.float32)
    version = buffer._version
    assert timing.reading(buffer)().item() == 45 and buffer._version == version


def test_only_the_call_lies_between_the_events(monkeypatch):
    # The twin of the clock on a GPU: what is put into the stream, in order.
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            stream.append("event")

        def synchronize(self):
            stream.append("wait")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = timing.cold_clock(lambda: stream.append("flush"))
    assert clock(lambda: stream.append("call")) == 2e-3
    assert stream == ["flush", "event", "call", "event", "wait"]


def test_the_flush_is_larger_than_the_cache_of_the_card(monkeypatch):
    made = []
    properties = {"L2_cache_size": 50 * 2**20}
    real = torch.zeros
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties)
    )
    monkeypatch.setattr(torch, "zeros", lambda n, device: made.append(4 * n) or real(1))
    timing.cuda_timer()
    del properties["L2_cache_size"]
    timing.cuda_timer()
    assert made == [timing.FLUSH_CACHES * 50 * 2**20, timing.FLUSH_CACHES * timing.LARGEST_CACHE]


def test_plot(rows, tmp_path):
    save_plot(rows, "a card", tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_tiles_divide_every_shape():
    for shape in SHAPES.values():
        assert shape.hidden % problem._tile(shape) == 0 == shape.inner % problem._tile(shape)


def test_wint2_computes_the_layer_that_it_is_compared_with():
    shape = Shape(128, 256, 3, 2)
    method = packed_wint2(shape, DEVICE)
    batch = make_batch(shape, 3, DEVICE)
    found = method.prepare(batch)().float()
    expected = run.reference(method, 3, batch)
    assert (found - expected).norm() < 0.01 * expected.norm()
    matrices = random_wint2(shape, 1, DEVICE)
    assert method.expert_bytes == sum(part.nbytes for matrix in matrices for part in matrix.parts)
    # Its groups do not fit the small sizes.
    assert methods(SHAPES["tiny"], ["wint2"], DEVICE) == []
