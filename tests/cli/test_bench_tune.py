"""`bench tune`: what reaches a user, with a card that is made up."""

import json

import pytest
import torch

from erniequant_kernels import tuning
from erniequant_kernels.bench import machine, timing, tune, tune_card


def test_tune_refuses_without_a_gpu_and_says_what_to_do(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "tune", "--output", tmp_path / "tuning.json")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "--dry-run" in result.stderr and not (tmp_path / "tuning.json").exists()


def test_a_dry_run_counts_candidates(run, tmp_path):
    out = tmp_path / "count.json"
    result = run("bench", "tune", "--dry-run", "--tokens", "16,1", "--bits", "2", "--json", out)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(out.read_text())
    listed = [(p["shape"], p["tokens"], p["bits"]) for p in found["problems"]]
    assert listed == [("21b", 16, 2), ("vl", 16, 2), ("21b", 1, 2), ("vl", 1, 2)]
    numbers = [len(tune.candidates(n * 6 / 64)) for n in (16, 16, 1, 1)]
    assert [p["candidates"] for p in found["problems"]] == numbers
    assert found["candidates"] == sum(numbers)
    assert f"{sum(numbers)} candidates in all" in result.stdout


class Card:
    """Every candidate runs in as many microseconds as its row tile has tokens, odd stages faster;
    of what is asked after so many questions nothing is answered."""

    failures = tune_card.Counter({"spills": 2})

    def __init__(self, *_, answers=100):
        self.answers = answers

    def __call__(self, problem, tables, rounds):
        self.answers -= 1
        if self.answers < 0:
            raise KeyboardInterrupt
        rows = [table.rows[table.row(problem.load)] for table in tables]
        stages = [row.tiles[problem.bits].stages for row in rows]
        return [1e-6 * row.block_m / n for row, n in zip(rows, stages, strict=True)]


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(timing, "cuda_timer", lambda: None)
    monkeypatch.setattr(machine, "machine", lambda: {"card": "a card"})
    monkeypatch.setattr(tune_card, "OnCard", Card)
    tuning.tuning_for.cache_clear()
    yield
    tuning.tuning_for.cache_clear()


def test_the_table_is_written_and_told(run, card, tmp_path):
    out, table, again = (tmp_path / name for name in ("all.json", "tuning.json", "again.json"))
    options = ("--tokens", "1,16", "--bits", "2,4", "--shape", "21b")
    result = run("bench", "tune", *options, "--output", table, "--json", out)
    assert (result.exit_code, result.stderr) == (0, "")
    written = json.loads(table.read_text())
    assert set(written) == set(tuning.tables())
    rows = tuning.parse(written["sm_90"]).rows
    assert [row.block_m for row in rows[:2]] == [8, 8]
    assert all(row.tiles[bits].stages == 3 for row in rows[:2] for bits in (2, 4))
    found = json.loads(out.read_text())
    assert found["table"] == written["sm_90"] and found["failures"] == {"spills": 2}
    assert [(f["tokens"], f["bits"]) for f in found["searched"]] == [
        (1, 2),
        (1, 4),
        (16, 2),
        (16, 4),
    ]
    first = found["searched"][0]
    assert first["best"]["block_m"] == 8 and first["microseconds"] == pytest.approx(8 / 3)
    lines = result.stdout.splitlines()
    assert lines[0].split()[:5] == ["21b", "1", "2", "bits", "2.7"] and "stages 3" in lines[0]
    assert "4 of 4 batches searched" in result.stdout
    # The same times, the same file.
    assert run("bench", "tune", *options, "--output", again, "--quiet").stdout == ""
    assert again.read_bytes() == table.read_bytes()


def test_what_was_found_is_there_when_the_search_is_ended(run, card, monkeypatch, tmp_path):
    # Two questions a batch: the second batch is interrupted.
    monkeypatch.setattr(tune_card, "OnCard", lambda *_: Card(answers=3))
    table = tmp_path / "tuning.json"
    result = run("bench", "tune", "--tokens", "1,16", "--bits", "2", "--output", table)
    assert result.exit_code == 130
    row, *others = tuning.parse(json.loads(table.read_text())["sm_90"]).rows
    assert row.tiles[2].stages == 3 and tuple(others) == tuning.tables()["sm_90"].rows[1:]


def test_no_time_is_a_failure(run, card, tmp_path):
    result = run("bench", "tune", "--seconds", 0, "--output", tmp_path / "tuning.json")
    assert result.exit_code == 1 and "allow more time" in result.stderr
