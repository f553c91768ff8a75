"""The benchmark on the CPU: rounds, caches and rates; times are made up."""

import dataclasses
import os

import pytest
import torch

from erniequant_kernels.bench.cpu import machine, methods, run
from erniequant_kernels.bench.plot import curves, save_plot
from erniequant_kernels.bench.problem import SHAPES, Shape, make_batch
from erniequant_kernels.bench.rows import wrong

# The smallest that WINT2 takes: two groups of 64 inputs. Five experts, so that copies of three do
# not come out even.
SMALL = Shape(256, 128, 5, 2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(methods, "HELD_BYTES", 2**19)
    monkeypatch.setattr(run, "TRIAD_NUMBERS", 1000)
    monkeypatch.setattr(run, "ENOUGH_ROUNDS", 6)
    monkeypatch.setattr(run, "others_seconds", lambda: 0.0)


def constant(call):
    call()
    return 1e-3


def measured(shape, tokens, codes, clock=constant):
    return list(run.measure([shape], tokens, codes, clock))


def test_every_method_computes_the_layer():
    # 30 tokens: more than one block of 24 rows for some expert.
    found = measured("small", [1, 30], ["2", "3", "4", "wint2"])
    assert [len(result.rows) for result in found] == [6, 6]
    rows = [row for result in found for row in result.rows]
    assert wrong(rows) == [] and all(row.error is not None for row in rows)
    assert {row.method for row in rows} == {
        "erniequant 2 bits", "erniequant 3 bits", "erniequant 4 bits", "WINT2",
        "bf16 torch linear", "fp32 torch linear",
    }  # fmt: skip
    assert len(curves(rows, "small")) == 6


def test_a_wrong_product_is_found():
    ours = methods.packed(SMALL, 2)
    broken = dataclasses.replace(ours, run=lambda batch: 1.1 * ours.run(batch))
    (row,) = run.measure_batch("small", SMALL, [broken], 3, constant).rows
    assert wrong([row])


def test_rates_follow_from_sizes_and_times():
    (result,) = measured("small", [30], ["2"])
    ours, bf16, fp32 = result.rows
    # All five experts of 3 * 256 * 128 weights, scales of 2 bytes for 2 * 128 + 256 outputs; x and
    # the result are 30 * 256 bfloat16 numbers each.
    weights = 3 * 256 * 128
    passed = 2 * 30 * 256 * 2
    for row, expert in ((ours, weights / 4 + 2 * 512), (bf16, 2 * weights), (fp32, 4 * weights)):
        assert row.microseconds == pytest.approx(1000)
        assert row.gigabytes_per_second == pytest.approx((5 * expert + passed) / 1e-3 / 1e9)
        assert row.products_per_second == pytest.approx(30 * 2 * weights / 1e-3 / 1e9)
    # Three vectors of 1000 float32 numbers.
    assert result.triad == pytest.approx(12000 / 1e-3)
    assert ours.memory_limit_percent == pytest.approx(
        100 * ours.gigabytes_per_second * 1e9 / result.triad
    )


def test_ratios_are_taken_round_by_round():
    # A machine that gets slower: every call of round n takes n milliseconds.
    clock = SlowingClock(calls=5)
    (result,) = measured("small", [1], ["2", "4"], clock)
    assert len(result.ratios) == 4
    for ratio in result.ratios:
        assert ratio.method.startswith("erniequant") and ratio.rival.endswith("torch linear")
        assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1, 1, 1))
        assert ratio.rounds == 6
    ours = result.rows[0]
    assert (ours.low, ours.microseconds, ours.high) == pytest.approx((1e3, 3.5e3, 6e3))


class SlowingClock:
    """Each call takes as many milliseconds as the number of its round, of so many calls."""

    def __init__(self, calls):
        self.calls, self.called = calls, 0

    def __call__(self, call):
        call()
        self.called += 1
        return 1e-3 * ((self.called - 1) // self.calls + 1)


def test_long_calls_have_the_fewest_rounds():
    (result,) = measured("small", [1], ["2"], lambda call: 100.0)
    assert {ratio.rounds for ratio in result.ratios} == {run.FEWEST_ROUNDS}


def test_rounds_with_other_work_do_not_count():
    rounds = [run.Round(1.0, [1.0], 0.0) for _ in range(5)]
    busy = [run.Round(9.0, [9.0], 1.5), run.Round(9.0, [9.0], run.QUIET + 0.01)]
    assert run.quiet([*busy, *rounds]) == (rounds, 0.0)
    # Too few quiet ones: all count, and the result says so.
    few = rounds[:4] + busy[:1]
    assert run.quiet(few) == (few, pytest.approx(0.3))


def test_a_busy_machine_is_waited_for(monkeypatch):
    """Others work for two rounds; the rounds after them are the ones that count."""
    seconds = iter([0.0, 99.0, 99.0, 999.0, *[999.0] * 20])
    ours = methods.packed(SMALL, 2)
    monkeypatch.setattr(run, "others_seconds", lambda: next(seconds))
    result = run.measure_batch("small", SMALL, [ours], 1, lambda _: 5.0)
    assert result.rows[0].other_cores == 0
    # Two readings a round: five quiet rounds.
    assert len(list(seconds)) == 20 - 2 * 5


def test_a_machine_that_is_never_quiet_is_not_waited_for_forever(monkeypatch):
    seconds = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(run, "others_seconds", lambda: next(seconds))
    ours = methods.packed(SMALL, 2)
    result = run.measure_batch("small", SMALL, [ours], 1, lambda _: 1.0)
    # 46 rounds of a second, with two readings each.
    assert next(seconds) == 2 * 46 * 1000 and result.rows[0].other_cores > 1


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell")
def test_own_work_is_not_that_of_others():
    import time

    others, own, begun = machine.others_seconds(), time.process_time(), time.perf_counter()
    while time.process_time() - own < 0.5:
        pass
    wall = time.perf_counter() - begun
    found = machine.others_seconds() - others
    # Whatever the rest of the machine does, there are so many cores; ticks are 10 ms.
    assert -0.05 <= found <= (os.cpu_count() or 1) * wall - 0.5 + 0.05


def test_no_call_finds_its_weights_in_a_cache():
    """Until an expert comes again, so much else was read that a cache has lost it."""
    ours = methods.packed(SMALL, 2)
    assert ours.experts * ours.expert_bytes >= 2**19 > (ours.experts - 1) * ours.expert_bytes
    seen = []
    recording = dataclasses.replace(
        ours, run=lambda batch: seen.append(batch.expert_index.unique().tolist()) or ours.run(batch)
    )
    run.measure_batch("small", SMALL, [recording], 1, constant)
    # After the check, a call to compile and six rounds.
    read = [expert for experts in seen[1:] for expert in experts]
    assert read == [n % ours.experts for n in range(7 * 2)]


def test_torch_s_weights_lie_in_as_much_memory():
    ours = methods.packed(SMALL, 2)
    read = []

    def weight(projection, expert):
        read.append(expert)
        return ours.weight(projection, expert)

    rival = methods.dense(SMALL, torch.bfloat16, weight)
    # 196,608 bytes an expert: three copies take half a MiB, and stand for five experts.
    assert (len(read), set(read), rival.experts) == (2 * 3, {0, 1, 2}, 6)
    assert rival.expert_bytes == 2 * SMALL.weights_per_expert


def test_tokens_of_an_expert_stay_together():
    batch = make_batch(SMALL, 7, torch.device("cpu"))
    there = methods.turned(batch, 8, 10)
    assert there.active_experts == batch.active_experts == 5
    assert set(there.expert_index.flatten().tolist()) == {8, 9, 0, 1, 2}
    for a, b in zip(batch.expert_index.flatten(), there.expert_index.flatten(), strict=True):
        assert torch.equal(batch.expert_index == a, there.expert_index == b)


def test_wint2_is_left_out_where_its_groups_do_not_fit():
    assert SHAPES["tiny"].inner % 128
    assert [m.name for m in methods.methods(SHAPES["tiny"], ["2", "wint2"])] == [
        "erniequant 2 bits", "bf16 torch linear", "fp32 torch linear",
    ]  # fmt: skip
    assert methods.methods(SHAPES["tiny"], ["wint2"]) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux only")
def test_pinning_ends_with_the_measurement():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with machine.pinned(1):
        assert os.sched_getaffinity(0) == {min(before)}
        assert torch.get_num_threads() == 1
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (before, threads)


def test_the_facts_name_the_code_that_is_measured():
    from erniequant_kernels.cpu.machine import machine as target

    facts = machine.machine(2)
    assert facts["threads"] == 2 and facts["code_for"] == target().name
    assert facts["processor"]


def test_plot(tmp_path):
    (result,) = measured("small", [3], ["2"])
    save_plot(result.rows, "a processor", tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
