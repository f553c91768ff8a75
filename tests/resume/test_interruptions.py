"""Killed, out of disk, started twice, changed in between: a run goes on to the same bytes, or says
in one line why not."""

import datetime
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.resume.lock import Lock
from tests.resume.hostile import KILL
from tests.resume.kills import Driver, contents, survive_kills

KILLS = 8
WORK = ".erniequant-work"
Whole = tuple[dict[str, bytes], int]


@pytest.fixture
def killed(driver: Driver, micro_source: Path, options: dict[str, Any], tmp_path: Path) -> Path:
    """A destination whose run was killed in the second of its two MoE layers."""
    dst = tmp_path / "q"
    outcome = driver.run(micro_source, dst, options, kill_at=KILL)
    assert outcome == {"signal": 9}
    journal = (dst / WORK / "journal.jsonl").read_text()
    assert '"layer":2,"expert":' in journal and '"event":"layer","t"' in journal
    return dst


def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    driver: Driver, micro_source: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    seed = datetime.date.today().toordinal()
    assert survive_kills(driver, micro_source, options, tmp_path, KILLS, seed) == []


def test_an_unfinished_run_is_not_taken_for_a_model(killed: Path) -> None:
    with pytest.raises(ErnieQuantError, match="unfinished quantisation; repeat its command"):
        erniequant.load(killed)


def test_going_on_does_not_begin_anew(
    driver: Driver, micro_source: Path, options: dict[str, Any], killed: Path, whole: Whole
) -> None:
    outcome = driver.run(micro_source, killed, options | {"resume": True})
    assert outcome["ok"] and outcome["sessions"] == 2
    # What is left, and the completion, not everything again.
    assert outcome["events"] < 0.6 * whole[1]
    assert contents(killed) == whole[0]


@pytest.mark.parametrize("share", [0.5, 1.05])
def test_a_file_too_large_before_any_expert_leaves_nothing(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    tmp_path: Path,
    whole: Whole,
    share: float,
) -> None:
    # A file of the result does not fit (found before any work), or only the hidden states do not:
    # 768 tokens of 96 channels in two streams are larger than the model.
    size = len(whole[0]["model.safetensors"])
    assert 1.05 * size < 2 * 768 * 96 * 4
    dst = tmp_path / "q"
    outcome = driver.run(micro_source, dst, options, file_limit=int(share * size))
    assert "cannot write" in outcome["error"] and "File too large" in outcome["error"]
    assert "\n" not in outcome["error"]
    assert not dst.exists()
    assert driver.run(micro_source, dst, options)["ok"]
    assert contents(dst) == whole[0]


@pytest.mark.parametrize("place", [KILL, 172])
def test_a_disk_that_fills_up_later_is_one_line_and_can_be_gone_on_from(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    tmp_path: Path,
    whole: Whole,
    place: int,
) -> None:
    # Among the experts, and while the files beside the weights are written.
    outcome = driver.run(micro_source, tmp_path / "q", options, full_at=place)
    assert "No space left on device; check space and permissions" in outcome["error"]
    assert driver.run(micro_source, tmp_path / "q", options | {"resume": True})["ok"]
    assert contents(tmp_path / "q") == whole[0]


def test_a_destination_below_a_file_is_refused(
    driver: Driver, micro_source: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("dst", "work_dir"):
        below = tmp_path / "file" / "q"
        dst = below if name == "dst" else tmp_path / "q"
        changed = options if name == "dst" else options | {"work_dir": str(below)}
        outcome = driver.run(micro_source, dst, changed)
        assert outcome["error"].startswith(f"cannot write {below}: Not a directory")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_second_run_is_refused_with_the_first_ones_pid_and_host(
    driver: Driver, micro_source: Path, options: dict[str, Any], killed: Path, whole: Whole
) -> None:
    before = {p.name: p.read_bytes() for p in (killed / WORK).iterdir() if p.name != "lock"}
    lock = Lock(killed / WORK / "lock")
    for resume in (None, True, False):
        error = driver.run(micro_source, killed, options | {"resume": resume})["error"]
        assert f"another run (pid {os.getpid()} on {socket.gethostname()})" in error
    lock.release()
    after = {p.name: p.read_bytes() for p in (killed / WORK).iterdir() if p.name != "lock"}
    assert before == after
    assert driver.run(micro_source, killed, options)["ok"]
    assert contents(killed) == whole[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 3}, "--bits was 2, now 3"),
        ({"effort": "standard"}, "--effort was fast, now standard"),
        ({"seed": 5}, "--seed was 0, now 5"),
        ({"calib_samples": 11}, "--calib-samples was 12, now 11"),
        ({"calib": "builtin"}, "--calib was"),
        ({"no_calib": True}, "calibration was text, now none"),
    ],
)
def test_other_options_are_refused_by_name(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    killed: Path,
    change: dict[str, Any],
    named: str,
) -> None:
    error = driver.run(micro_source, killed, options | change)["error"]
    assert "unfinished run that differs" in error and named in error
    assert "--restart" in error
    assert not (killed / "config.json").exists()


def _edit_text(source: Path, text: Path) -> None:
    text.write_text(text.read_text()[::-1])


def _edit_tokenizer(source: Path, text: Path) -> None:
    path = source / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def _edit_config(source: Path, text: Path) -> None:
    path = source / "config.json"
    path.write_text(path.read_text().replace("1e-05", "2e-05"))


def _edit_weights(source: Path, text: Path) -> None:
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_edit_text, "the calibration text was"),
        (_edit_tokenizer, "the source's other files was"),
        (_edit_config, "the source's config.json was"),
        (_edit_weights, "model.safetensors of the source has changed"),
    ],
)
def test_a_changed_source_or_text_is_refused_by_name(
    driver: Driver,
    micro_source: Path,
    micro_text: Path,
    options: dict[str, Any],
    tmp_path: Path,
    whole: Whole,
    edit: Callable[[Path, Path], None],
    named: str,
) -> None:
    source, text, dst = tmp_path / "source", tmp_path / "text.txt", tmp_path / "q"
    shutil.copytree(micro_source, source)
    shutil.copy(micro_text, text)
    options = options | {"calib": str(text)}
    assert driver.run(source, dst, options, kill_at=KILL) == {"signal": 9}
    edit(source, text)
    error = driver.run(source, dst, options)["error"]
    assert named in error and "--restart" in error
    # The same bytes with another date are the same source.
    shutil.rmtree(source)
    shutil.copytree(micro_source, source, copy_function=shutil.copyfile)
    shutil.copy(micro_text, text)
    assert driver.run(source, dst, options)["ok"]
    assert contents(dst) == whole[0]


def test_another_version_is_refused_by_name(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    killed: Path,
) -> None:
    from erniequant.resume.journal import _line, _parse

    path = killed / WORK / "journal.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    head = _parse(first)
    assert head is not None
    head["identity"]["torch version"] = "2.11.0"
    path.write_bytes(_line(head) + rest)
    error = driver.run(micro_source, killed, options)["error"]
    assert "torch version was 2.11.0, now " in error


def test_restart_discards_what_was_begun(
    driver: Driver, micro_source: Path, options: dict[str, Any], killed: Path, whole: Whole
) -> None:
    outcome = driver.run(micro_source, killed, options | {"bits": 3, "resume": False}, kill_at=KILL)
    assert outcome == {"signal": 9}
    outcome = driver.run(micro_source, killed, options | {"resume": False})
    assert outcome["ok"] and outcome["sessions"] == 1
    assert contents(killed) == whole[0]


def test_resume_insists_on_an_unfinished_run(
    driver: Driver, micro_source: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    error = driver.run(micro_source, tmp_path / "q", options | {"resume": True})["error"]
    assert "there is no unfinished run" in error
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("resume", [None, True, False])
def test_a_finished_model_is_never_touched(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    tmp_path: Path,
    whole: Whole,
    resume: bool | None,
) -> None:
    dst = tmp_path / "q"
    dst.mkdir()
    for name, data in whole[0].items():
        (dst / name).write_bytes(data)
    error = driver.run(micro_source, dst, options | {"resume": resume})["error"]
    assert "not empty" in error or "no unfinished run" in error
    assert contents(dst) == whole[0]


def test_the_work_folder_may_be_elsewhere_but_of_its_own(
    driver: Driver, micro_source: Path, options: dict[str, Any], tmp_path: Path, whole: Whole
) -> None:
    work, dst = tmp_path / "work", tmp_path / "q"
    work.mkdir()
    elsewhere = options | {"work_dir": str(work)}
    assert driver.run(micro_source, dst, elsewhere, kill_at=KILL) == {"signal": 9}
    assert not (dst / WORK).exists() and (work / "journal.jsonl").exists()
    error = driver.run(micro_source, tmp_path / "other", elsewhere)["error"]
    assert "the destination was" in error
    assert driver.run(micro_source, dst, elsewhere)["ok"]
    assert contents(dst) == whole[0]
    assert list(work.iterdir()) == []
    (work / "mine.txt").write_text("mine")
    error = driver.run(micro_source, tmp_path / "third", elsewhere)["error"]
    assert "holds mine.txt, which is not erniequant's" in error


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damage_to_what_was_kept_is_found(
    driver: Driver, micro_source: Path, options: dict[str, Any], killed: Path, tmp_path: Path
) -> None:
    def outcome_after(damage: Callable[[Path], None]) -> str:
        dst = tmp_path / "damaged"
        shutil.copytree(killed, dst)
        damage(dst)
        error = str(driver.run(micro_source, dst, options)["error"])
        shutil.rmtree(dst)
        return error

    def states(dst: Path) -> Path:
        return next((dst / WORK).glob("states-*.f32"))

    assert "is damaged" in outcome_after(lambda dst: _flip(states(dst), 1000))
    assert "is damaged" in outcome_after(lambda dst: os.truncate(states(dst), 1000))
    assert "cannot read" in outcome_after(lambda dst: states(dst).unlink())
    journal = f"{WORK}/journal.jsonl"
    assert "line 1 is damaged" in outcome_after(lambda dst: _flip(dst / journal, 30))
    # The packed words of expert 0 of layer 2, which is under way.
    from erniequant.checkpoint.reader import read_header

    partial = killed / ".model.safetensors.partial"
    place = read_header(partial)["model.layers.2.mlp.experts.gate_up_proj_packed"].offset
    error = outcome_after(lambda dst: _flip(dst / partial.name, place + 5))
    assert "layer 2 expert 0" in error and "--restart" in error
