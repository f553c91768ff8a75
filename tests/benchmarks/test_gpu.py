"""`make gpu` without a GPU: the runner on parts that hang, fail and die; its order, its limits, and
what a second run does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import compared, parts, records, report, runner
from benchmarks.gpu.runner import Part, Report, run_all
from benchmarks.pages import ROOT

FACTS = {"commit": "abc", "machine": {"card": "NVIDIA H100 80GB HBM3"}}

RECORDS = "from benchmarks.gpu.records import record; "


def part(name: str, program: str, limit: float = 20.0, least: float = 0.0) -> Part:
    return Part(name, ("-c", program), limit, least)


GOOD = part("good", RECORDS + "print('one'); record(found=1); record(found=2); print('two')")
WRONG = part("wrong", "print('expected 1, found 2'); raise SystemExit(1)")
DEAD = part("dead", "import os, sys; print('before', flush=True); os.kill(os.getpid(), 9)")
HANGING = part(
    "hanging", RECORDS + "import time; record(found=3); print('so far'); time.sleep(60)", limit=3.0
)


def run(
    path: Path, every: list[Part], seconds: float = 60.0, fresh: bool = False, **facts: Any
) -> tuple[dict[str, Any], list[str]]:
    """The parts of the JSON file after a run, and what was said."""
    said: list[str] = []
    run_all(every, Report(path, FACTS | facts, every, fresh), seconds, said.append, lambda _: None)
    return json.loads(path.read_text())["parts"], said


def begun(said: list[str]) -> list[str]:
    return [line.split(" (")[0].removeprefix("== ") for line in said if "(at most" in line]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The parts find the plugin as they do when the report is run from the root.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "report.json"


def test_every_part_runs_whatever_becomes_of_the_others(path: Path) -> None:
    started = time.monotonic()
    found, said = run(path, [WRONG, HANGING, DEAD, GOOD])
    assert time.monotonic() - started < 50
    assert begun(said) == ["wrong", "hanging", "dead", "good"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "wrong": "failed", "hanging": "timed out", "dead": "failed", "good": "passed",
    }  # fmt: skip
    assert found["wrong"]["output"] == "expected 1, found 2\n"
    assert found["dead"]["output"] == "before\n" and found["dead"]["exit_code"] == -9
    assert found["good"]["output"] == "one\ntwo\n"
    assert found["good"]["records"] == [{"found": 1}, {"found": 2}]
    # What a part that is stopped had said and found.
    assert found["hanging"]["output"] == "so far\n"
    assert found["hanging"]["records"] == [{"found": 3}]
    assert 3.0 <= found["hanging"]["seconds"] < 50


def test_workers_of_a_part_end_with_it(path: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        "import subprocess, sys, time; "
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(pid)!r}, 'w').write(str(worker.pid)); time.sleep(60)"
    )
    run(path, [part("hanging", program, limit=3.0)])
    worker = Path(f"/proc/{pid.read_text()}/stat")
    # Ended, or a zombie that nobody has waited for.
    assert not worker.exists() or worker.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_report_is_there_while_a_part_runs(path: Path, tmp_path: Path) -> None:
    """As for somebody who ends the whole run: the file has what the part said until then."""
    copy = tmp_path / "copy.json"
    program = (
        "import shutil, time; print('halfway', flush=True); time.sleep(1); "
        f"shutil.copy({str(path)!r}, {str(copy)!r})"
    )
    monkey = pytest.MonkeyPatch()
    monkey.setattr(runner, "WRITE_SECONDS", 0.1)
    with monkey.context():
        run(path, [part("slow", program), GOOD])
    seen = json.loads(copy.read_text())["parts"]
    monkey.undo()
    assert seen["slow"]["status"] == "running" and seen["slow"]["output"] == "halfway\n"
    assert seen["good"]["status"] == "not reached"


def test_a_second_run_continues(path: Path) -> None:
    run(path, [GOOD, WRONG, HANGING])
    later = part("later", "print('here')")
    found, said = run(path, [GOOD, HANGING, WRONG, later])
    # Neither what passed nor what failed; what was never begun comes before what hung.
    assert begun(said) == ["later", "hanging"]
    assert [entry["status"] for entry in found.values()] == [
        "passed", "timed out", "failed", "passed",
    ]  # fmt: skip
    assert found["good"]["records"] == [{"found": 1}, {"found": 2}]
    # In the order of the list, not of the runs.
    assert list(found) == ["good", "hanging", "wrong", "later"]


def test_a_part_that_was_running_when_the_run_was_ended_runs_again(path: Path) -> None:
    run(path, [GOOD])
    content = json.loads(path.read_text())
    content["parts"]["good"]["status"] = "running"
    path.write_text(json.dumps(content))
    assert begun(run(path, [GOOD])[1]) == ["good"]


@pytest.mark.parametrize("change", ["sources", "card", "fresh", "damaged"])
def test_another_card_or_other_sources_start_anew(path: Path, change: str) -> None:
    run(path, [GOOD], sources="1")
    options: dict[str, Any] = {"sources": "1"}
    if change == "sources":
        options["sources"] = "2"
    elif change == "card":
        options["machine"] = {"card": "NVIDIA H200"}
    elif change == "fresh":
        options["fresh"] = True
    else:
        path.write_text(path.read_text()[:50])
    assert begun(run(path, [GOOD], **options)[1]) == ["good"]
    assert begun(run(path, [GOOD], **options | {"fresh": False})[1]) == []


def test_no_part_begins_without_the_time_it_needs(path: Path) -> None:
    long = part("long", "import time; print('begun'); time.sleep(60)", limit=50.0, least=1.0)
    needy = part("needy", "print('here')", limit=50.0, least=30.0)
    found, said = run(path, [needy, long, part("last", "print('here')", least=1.0)], seconds=4.0)
    assert begun(said) == ["long"]
    assert found["long"]["status"] == "timed out" and found["long"]["output"] == "begun\n"
    assert found["long"]["limit"] <= 4.0 and found["long"]["seconds"] < 10
    assert found["needy"]["status"] == found["last"]["status"] == "not reached"


def test_only_the_end_of_a_long_output_is_kept(path: Path) -> None:
    text = "".join(f"{n}\n" for n in range(10_000))
    found, _ = run(path, [part("long", "for n in range(10_000): print(n)")])
    assert found["long"]["output"] == text[-runner.OUTPUT_CHARACTERS :]


TESTS = """
import os, signal, time, pytest
from pathlib import Path

@pytest.mark.parametrize("n", range(3))
def test_good(n): pass

def test_wrong(): assert 1 + 1 == 3

@pytest.mark.skip
def test_skipped(): pass

@pytest.fixture
def broken(): raise OSError("no such card")

def test_broken(broken): pass

def test_deadly():
    records = Path(os.environ["GPU_REPORT_RECORDS"])
    while not records.exists() or len(records.read_text().splitlines()) < 6: time.sleep(0.05)
    os.killpg(os.getpgrp(), signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_outcomes_of_tests_are_there_at_once(
    path: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pytest of the part is nobody's worker, even if this one is.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    # The last test ends pytest and its workers, as a card that hangs the machine would.
    file = tmp_path / "test_toy.py"
    file.write_text(TESTS)
    made = parts._tests("toy", 60.0, str(file), "--rootdir", str(tmp_path), workers=workers)
    entry = run(path, [made])[0]["toy"]
    assert (entry["status"], entry["exit_code"]) == ("failed", -9), entry
    assert entry["tests"]["outcomes"] == {"failed": 2, "passed": 3, "skipped": 1}
    wrong, broken = sorted(entry["tests"]["failures"], key=lambda f: "broken" in f["test"])
    assert wrong["test"].endswith("test_wrong") and "assert (1 + 1) == 3" in wrong["text"]
    assert broken["test"].endswith("test_broken") and "no such card" in broken["text"]


def test_the_last_record_may_be_incomplete(tmp_path: Path) -> None:
    file = tmp_path / "records"
    file.write_text('{"found": 1}\n{"fou')
    assert records.read(file) == [{"found": 1}]
    assert records.read(tmp_path / "none") == []


def test_the_exit_code(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Report(path, FACTS, [GOOD, WRONG], fresh=True)
    for state, code in (("passed", 0), ("failed", 1), ("timed out", 1), ("not reached", 0)):
        made.parts["good"]["status"] = state
        assert report.conclusion(made, path) == code
    # What time did not allow is left for the next run, and is no failure.
    assert "not reached: good; wrong" in capsys.readouterr().out


def test_the_whole_program(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "parts", lambda tuning: [GOOD, WRONG])
    monkeypatch.setattr(report, "facts", lambda: FACTS)
    monkeypatch.setattr(sys, "argv", ["report", "--output", str(path), "--seconds", "60"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert report.main() == 2 and not path.exists()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert report.main() == 1
    out = capsys.readouterr().out
    assert "one\ntwo\n" in out and "failed: wrong" in out and str(path) in out
    content = json.loads(path.read_text())
    assert content["commit"] == "abc" and list(content["parts"]) == ["good", "wrong"]


def test_the_sources_decide_whether_a_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    file = tmp_path / "kernels/erniequant_kernels/tuning.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    before = report.sources()
    (file.parent / "notes.txt").write_text("no source")
    assert report.sources() == before
    file.write_text("{ }")
    assert report.sources() != before


def test_the_parts_are_listed_without_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.report", "--list"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    every = parts.parts(Path("gpu-report.tuning.json"))
    for line, listed in zip(done.stdout.splitlines(), every, strict=True):
        assert listed.name in line and f"{listed.limit:.0f} s" in line


def test_the_most_telling_parts_come_first_and_fit() -> None:
    every = parts.parts(Path("t.json"))
    names = [p.name for p in every]
    assert len(set(names)) == len(names)
    assert names[:6] == [
        "compile, 21b", "exact decoding", "products, 21b", "graphs, 21b", "a model, end to end",
        "encoder",
    ]  # fmt: skip
    # Even if each of them takes all that it may.
    assert sum(p.limit for p in every[:6]) <= report.SECONDS
    assert all(p.least <= p.limit for p in every)


def test_every_file_that_uses_a_card_is_a_part() -> None:
    files = {path.as_posix() for path in parts.test_files()}
    assert {
        "tests/kernels/test_moe.py",
        "tests/ccq/test_moe.py",
        "tests/runtime/test_ops.py",
    } < files
    assert not {file for file in files if "cpu" in file or "test_static" in file}
    assert files <= {p.name for p in parts.parts(Path("t.json"))}


def test_exact_decoding_has_every_code() -> None:
    (made,) = (p for p in parts.parts(Path("t.json")) if p.name == "exact decoding")
    command = [sys.executable, *made.arguments, "--collect-only", "-p", "no:xdist"]
    at = command.index("--numprocesses") if "--numprocesses" in command else len(command)
    command = command[:at] + command[at + 4 :]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    for name in ("cc2-8", "cc3-13", "cc4-16"):
        assert f"test_one_hot_inputs_read_every_weight[{name}]" in done.stdout, done.stderr


PAGE = """
<!-- prediction:begin -->
| card | tokens | bf16 | 4 bits | 2 bits | 2 bits is bound by |
|---|---|---|---|---|---|
| A100 80 GB | 1 | 87 | 29 (3.0 ×) | 20 (4.4 ×) | memory |
| H100 SXM | 1 | 57 | 22 (2.6 ×) | 16 (3.6 ×) | memory |
| H100 SXM | 16 | 378 | 102.5 (3.7 ×) | 56 (6.7 ×) | memory |
<!-- prediction:end -->
"""


def test_predictions_of_a_card(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    found = compared.predictions("NVIDIA H100 80GB HBM3", page)
    assert found == {
        (1, 16): 57, (1, 4): 22, (1, 2): 16, (16, 16): 378, (16, 4): 102.5, (16, 2): 56,
    }  # fmt: skip
    assert compared.predictions("NVIDIA A100-SXM4-80GB", page)[1, 16] == 87
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GeForce RTX 4090"):
        assert compared.predictions(other, page) == {}


def test_the_page_predicts_the_cards_at_hand() -> None:
    for card in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        found = compared.predictions(card)
        assert {(tokens, bits) for tokens in (1, 16, 64, 2048) for bits in (2, 4, 16)} <= set(found)
        assert all(found.values())


def test_the_largest_errors_are_the_largest_factors() -> None:
    measured = {(1, 2): 20.0, (4, 2): 10.0, (16, 2): 10.0, (64, 2): 10.0, (1, 4): 5.0}
    predicted = {(1, 2): 16.0, (4, 2): 40.0, (16, 2): 2.0, (64, 2): 13.0, (256, 2): 99.0}
    found = compared.compare(measured, predicted)
    assert [(c.tokens, c.bits) for c in found] == [(1, 2), (4, 2), (16, 2), (64, 2)]
    assert [(c.tokens, c.error) for c in compared.worst(found)] == [
        (16, -0.8), (4, 3.0), (64, pytest.approx(0.3)),
    ]  # fmt: skip
    assert "-80 %" in compared.table(found)


def test_measured_is_the_fastest_row_of_the_predicted_shape(path: Path) -> None:
    def row(bits: int, microseconds: float | None, shape: str = "21b") -> dict[str, Any]:
        return {"shape": shape, "tokens": 1, "bits": bits, "microseconds": microseconds}

    rows = [row(16, 90.0), row(16, 60.0), row(16, None), row(2, 20.0), row(4, 9.0, "vl")]
    assert compared.fastest(rows) == {(1, 16): 60.0, (1, 2): 20.0}
    program = f"from benchmarks.gpu.records import record; [record(row=r) for r in {rows!r}]"
    made = Report(path, FACTS, [part("products", program)], fresh=True)
    run_all([part("products", program)], made, 60.0, print, print, report.add_comparison)
    assert "largest errors" in report.add_comparison(made)
    content = json.loads(path.read_text())
    assert [(c["bits"], c["measured"]) for c in content["predicted"]] == [(2, 20.0), (16, 60.0)]
    assert len(content["largest_errors"]) == 2
