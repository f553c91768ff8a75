"""The benchmark without a GPU: every method computes the layer, figures follow from times."""

import pytest
import torch

from erniequant_kernels.bench import problem, run
from erniequant_kernels.bench import rows as results
from erniequant_kernels.bench.methods import baselines, packed
from erniequant_kernels.bench.plot import curves, save_plot
from erniequant_kernels.bench.problem import SHAPES, bytes_read, make_batch, make_experts
from erniequant_kernels.bench.timing import Time, summarize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fake_timer(call, capturable):
    call()
    return Time(1e-3, 0.9e-3, 1.2e-3)


@pytest.fixture(scope="module")
def rows():
    # Tokens below and above the first crossover of the default table (6 rows per expert).
    return list(run.measure(["tiny"], [3, 20], [2, 4], DEVICE, fake_timer, 1e9))


def test_every_method_ran_and_computes_the_layer(rows):
    assert {r.method for r in rows} == {
        packed(2).name, packed(4).name, *(m.name for m in baselines())
    }  # fmt: skip
    assert [r.method for r in rows if r.reason] == []
    assert results.wrong(rows) == []


def test_bfloat16_is_measured_once_per_batch(rows):
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


def test_only_active_experts_count():
    shape = SHAPES["21b"]
    batch = make_batch(shape, 1, torch.device("cpu"))
    assert batch.active_experts == 6
    weights = 6 * 3 * 2560 * 1536
    assert bytes_read(shape, batch, 16) == 2 * weights + 2 * 2560 * 2


def row(method, bits, microseconds, **changes):
    return results.Row("tiny", 4, method, bits, microseconds, **changes)


def test_the_verdict_is_against_the_fastest_rival():
    rows = [row("ours", 2, 10.0), row("slow", 16, 90.0), row("fast", 16, 25.0),
            row("broken", 16, None, reason="no")]  # fmt: skip
    (verdict,) = results.verdicts(rows)
    assert (verdict.best_bf16, verdict.speedup) == ("fast", 2.5)
    assert curves(rows, "tiny") == {"ours": [(4, 10.0)], "bf16, fastest": [(4, 25.0)]}


def test_a_wrong_result_is_named():
    assert "off by 0.5000" in results.wrong([row("ours", 2, 1.0, error=0.5)])[0]
    assert results.wrong([row("ours", 2, 1.0, error=float("nan"))])
    assert results.wrong([row("ours", 2, 1.0, error=0.001)]) == []


def test_a_failing_rival_is_reported_and_a_failure_of_ours_is_not_hidden(monkeypatch):
    def timer(call, capturable):
        raise RuntimeError("no kernel image")

    experts = make_experts(SHAPES["tiny"], 2, DEVICE)
    batch = make_batch(SHAPES["tiny"], 1, DEVICE)
    expected = run.reference(experts, batch)
    arguments = (experts, batch, expected, timer, 1e9)
    found = run._measure(baselines()[0], "tiny", 16, *arguments)
    assert found.microseconds is None and found.reason == "no kernel image"
    with pytest.raises(RuntimeError, match="no kernel image"):
        run._measure(packed(2), "tiny", 2, *arguments)


def test_the_spread_leaves_out_a_tenth_at_each_end():
    time = summarize([float(n) for n in range(20, 0, -1)])
    assert (time.median, time.low, time.high) == (10.5, 3.0, 18.0)


def test_plot(rows, tmp_path):
    save_plot(rows, "a card", tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_tiles_divide_every_shape():
    for shape in SHAPES.values():
        assert shape.hidden % problem._tile(shape) == 0 == shape.inner % problem._tile(shape)
