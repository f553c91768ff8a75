"""The demo on a random model: every row is there, sizes add up, reports and table agree."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import erniequant_data
from erniequant.demo import expert_parameters, round_experts, run_demo, tensor_bytes
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import load

EXPERT_WEIGHTS = 2 * 4 * 3 * 96 * 128


@pytest.fixture(scope="module")
def demo(tmp_path_factory, speaking_ernie):
    out = tmp_path_factory.mktemp("demo") / "new" / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erniequant_data, "tiny_model_dir", lambda: speaking_ernie)
        return run_demo(out, tokens=700, bits=(4, 2), calib_samples=1, keep_models=True), out


def test_rows_cover_every_model(demo):
    report, _ = demo
    assert [(row.method, row.bits) for row in report.rows] == [
        *(("bf16", 16), ("erniequant", 4), ("erniequant", 2), ("RTN", 4), ("RTN", 2)),
    ]
    assert report.expert_weights == EXPERT_WEIGHTS


def test_sizes_are_those_of_the_files(demo, speaking_ernie):
    report, out = demo
    original = tensor_bytes(speaking_ernie)
    other = original - 2 * EXPERT_WEIGHTS
    for row in report.rows[:3]:
        folder = speaking_ernie if row.bits == 16 else out / f"{row.bits}bit"
        assert row.megabytes == pytest.approx(tensor_bytes(folder) / 1e6)
        experts = 8 * (tensor_bytes(folder) - other) / EXPERT_WEIGHTS
        assert row.expert_bits_per_weight == pytest.approx(experts)
    assert report.rows[0].expert_bits_per_weight == 16
    # Gate and up have 96 inputs, down 128: two groups of 20 bits a row each.
    by_hand = 4 + (2 / 3) * 2 * 20 / 96 + (1 / 3) * 2 * 20 / 128
    assert report.rows[3].expert_bits_per_weight == pytest.approx(by_hand)


def test_fewer_bits_are_further_away(demo):
    report, _ = demo
    original, four, two, rtn_four, rtn_two = report.rows
    assert (original.ratio, original.kl_mean, original.top1_agreement) == (1, 0, 1)
    assert 0 < four.kl_mean < two.kl_mean
    assert rtn_four.kl_mean < rtn_two.kl_mean
    assert two.kl_mean < rtn_two.kl_mean


def test_reports_and_table_hold_the_same_figures(demo, run, monkeypatch, tmp_path):
    report, out = demo
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    markdown = (out / "report.md").read_text("utf-8")
    module = importlib.import_module("erniequant.demo")
    monkeypatch.setattr(module, "run_demo", lambda *_, **__: report)
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    for row in report.rows[1:]:
        figure = f"{row.ratio:.4f} ± {row.ratio_stderr:.4f}"
        assert figure in markdown and figure in result.stdout


def test_models_are_kept_only_if_asked_for(demo, speaking_ernie, monkeypatch, tmp_path):
    monkeypatch.setattr(erniequant_data, "tiny_model_dir", lambda: speaking_ernie)
    run_demo(tmp_path / "out", tokens=60, bits=(2,), calib_samples=1)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json", "report.md"}
    assert (demo[1] / "2bit" / "config.json").is_file()


def test_rounding_touches_experts_and_nothing_else(speaking_ernie):
    original, _ = load(speaking_ernie, device="cpu")
    rounded, _ = round_experts(original, 2)
    experts = set(expert_parameters(original))
    assert len(experts) == 4
    after = dict(rounded.named_parameters())
    changed = {n for n, p in original.named_parameters() if not torch.equal(p, after[n])}
    assert changed == experts


def test_output_that_is_a_file_is_refused(tmp_path):
    blocker = Path(tmp_path / "file")
    blocker.touch()
    with pytest.raises(ErnieQuantError, match="choose another --out"):
        run_demo(blocker)


def test_other_formats_are_asked_for(run, monkeypatch, demo, tmp_path):
    report, _ = demo
    seen = []
    module = importlib.import_module("erniequant.demo")
    monkeypatch.setattr(module, "run_demo", lambda *_, **k: seen.append(k) or report)
    assert run("demo", "--out", tmp_path, "--all-formats", "--quiet").exit_code == 0
    assert run("demo", "--out", tmp_path, "--quiet").exit_code == 0
    assert [k["all_formats"] for k in seen] == [True, False]
