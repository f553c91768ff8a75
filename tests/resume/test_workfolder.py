"""What a work folder keeps, when it lets go of it, and what it never touches."""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from erniequant.calibration.rows import RowPool, Rows
from erniequant.checkpoint.reader import WORK_FOLDER
from erniequant.errors import ErnieQuantError
from erniequant.resume import workfolder
from erniequant.resume.journal import Journal
from erniequant.resume.workfolder import WorkFolder
from tests.conftest import FileLimit, ReadOnly

IDENTITY = {"--bits": 2, "--calib": "builtin", "the calibration text": "ab" * 32}
# Two tables of different size; 7 numbers at a time divide neither, and a row of none.
SHAPES = ((5, 9), (3, 4))


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkFolder]:
    """A begun run in a folder that it made."""
    found = WorkFolder(tmp_path / "work")
    found.begin(IDENTITY)
    yield found
    found.release()


def tables(seed: int, pool: RowPool | None = None, shapes: Any = SHAPES) -> list[Rows]:
    """Tables of random bits: nan, inf and denormals are among them."""
    found = [(pool or RowPool()).empty(*shape) for shape in shapes]
    generator = torch.Generator().manual_seed(seed)
    for table in found:
        bits = torch.randint(-(2**31), 2**31, table.tensor.shape, generator=generator)
        table.tensor.copy_(bits.to(torch.int32).view(torch.float32))
    return found


def equal(first: list[Rows], second: list[Rows]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a.tensor.view(torch.int32), b.tensor.view(torch.int32)) for a, b in pairs
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def reopened(work: WorkFolder) -> WorkFolder:
    """The same folder in another session, after a kill of this one."""
    work._lock.release()
    found = WorkFolder(work.folder)
    found.begin(IDENTITY)
    return found


def fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_run_is_begun_once_and_continued_in_sessions(tmp_path: Path) -> None:
    for session in range(1, 4):
        work = WorkFolder(tmp_path / "a" / "work")
        assert work.unfinished() == (session > 1)
        work.begin(IDENTITY)
        assert work.unfinished() and work.journal.identity == IDENTITY
        assert len(work.journal.of("session")) == session
        work.release()
        assert names(work.folder) == ["journal.jsonl", "lock"]


def test_every_difference_to_the_run_that_is_there_is_named(work: WorkFolder) -> None:
    before = (work.folder / "journal.jsonl").read_bytes()
    changed = {"--bits": 3, "the calibration text": "cd" * 32, "--seed": 5}
    with pytest.raises(ErnieQuantError) as caught:
        work.begin(changed)
    # A long value is shortened; what only one of them has is None for the other.
    assert str(caught.value) == (
        f"{work.folder} holds an unfinished run that differs: --bits was 2, now 3; "
        "--calib was builtin, now None; the calibration text was abababababab…, now "
        "cdcdcdcdcdcd…; --seed was None, now 5. Repeat its command to continue it, or add "
        "--restart to start over"
    )
    assert (work.folder / "journal.jsonl").read_bytes() == before
    work.begin(dict(reversed(IDENTITY.items())))


@pytest.mark.parametrize("mapped", [False, True])
def test_states_come_back_to_the_bit(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    monkeypatch.setattr(workfolder, "_BLOCK", 7)
    pool = RowPool(work.folder) if mapped else None
    # Nothing kept: nothing is filled.
    empty = tables(0, pool)
    assert work.load_states(empty) == 0 and equal(empty, tables(0))
    for layer in (1, 2):
        work.save_states(layer, tables(layer, pool))
        found = tables(9, pool)
        assert work.load_states(found) == layer and equal(found, tables(layer))
    found = tables(9, pool)
    assert reopened(work).load_states(found) == 2 and equal(found, tables(2))


def test_states_of_no_tokens_are_kept_as_well(work: WorkFolder) -> None:
    shapes = ((0, 9), (0, 4))
    work.save_states(4, tables(0, shapes=shapes))
    assert work.load_states(tables(0, shapes=shapes)) == 4


def test_damaged_states_are_refused(work: WorkFolder) -> None:
    work.save_states(12, tables(1))
    path = work.folder / "states-00012.f32"
    sound = path.read_bytes()
    assert len(sound) == 4 * (5 * 9 + 3 * 4)
    flipped = []
    for place in (0, 4 * 45 - 1, 4 * 45, len(sound) - 1):
        flipped.append(bytearray(sound))
        flipped[-1][place] ^= 0x80
    # Short by a bit of the first table, of the second, of everything; too long; tables swapped.
    swapped = sound[4 * 45 :] + sound[: 4 * 45]
    for data in (*flipped, sound[:100], sound[:-1], b"", sound + b"\0", swapped):
        path.write_bytes(data)
        refused = rf"^{re.escape(str(path))} is damaged: its sha256 differs; use --restart\Z"
        # The old contents of the tables must not stand in for what is missing.
        with pytest.raises(ErnieQuantError, match=refused):
            work.load_states(tables(1))
    path.write_bytes(sound)
    assert work.load_states(tables(1)) == 12
    with pytest.raises(ErnieQuantError, match="is damaged"):
        work.load_states(tables(1, shapes=SHAPES[:1]))
    path.unlink()
    with pytest.raises(ErnieQuantError, match=r"^cannot read .*states-00012.f32: No such .*\Z"):
        work.load_states(tables(1))


def test_old_states_stay_until_the_new_ones_are_there(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch, files_of_at_most: FileLimit
) -> None:
    def still_of_layer(layer: int) -> None:
        found = tables(9)
        again = reopened(work)
        assert again.load_states(found) == layer and equal(found, tables(layer))
        again.release()

    work.save_states(1, tables(1))
    size = (work.folder / "states-00001.f32").stat().st_size
    with files_of_at_most(size - 1), pytest.raises(ErnieQuantError, match="File too large"):
        work.save_states(2, tables(2))
    assert names(work.folder) == ["journal.jsonl", "lock", "states-00001.f32"]
    still_of_layer(1)
    # The new ones are there, but the journal does not know.
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", fail)
        with pytest.raises(OSError):
            work.save_states(2, tables(2))
    still_of_layer(1)
    # The journal knows, and a kill leaves both.
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fail)
        with pytest.raises(ErnieQuantError, match=r"^cannot delete .*states-00001.f32: Input"):
            work.save_states(2, tables(2))
    assert {"states-00001.f32", "states-00002.f32"} < {*names(work.folder)}
    still_of_layer(2)
    work.save_states(3, tables(3))
    assert names(work.folder) == ["journal.jsonl", "lock", "states-00003.f32"]
    still_of_layer(3)


FOREIGN = [
    "notes.txt", ".journal.jsonl", "journal.jsonl.bak", ".lock", "rows-of-seats",
    "states-of-the-art.f32", "states-1.f32", "states-00001.f32.partial",
    "..states-00001.f32.partial",
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ErnieQuantError) as caught:
        WorkFolder(tmp_path)
    assert f"{tmp_path} holds {name}, which is not erniequant's" in str(caught.value)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("end", [WorkFolder.clear, WorkFolder.remove, WorkFolder.release])
def test_foreign_files_that_come_later_stay(
    work: WorkFolder, end: Callable[[WorkFolder], None]
) -> None:
    for name in FOREIGN:
        (work.folder / name).write_text("mine")
    (work.folder / "states-folder.f32").mkdir()
    for layer in (1, 2):
        work.save_states(layer, tables(layer))
    end(work)
    assert {*FOREIGN, "states-folder.f32"} <= {*names(work.folder)}


def test_what_a_kill_leaves_half_written_is_ours(tmp_path: Path) -> None:
    left = (".states-00003.f32.partial", ".journal.jsonl.partial", "states-00002.f32", "lock")
    for name in left:
        (tmp_path / name).write_bytes(b"x")
    # As a mapped table before its name goes.
    os.close(tempfile.mkstemp(prefix="rows-", dir=tmp_path)[0])
    work = WorkFolder(tmp_path)
    assert not work.unfinished()
    work.release()
    assert names(tmp_path) == []


def test_clearing_forgets_the_run_and_keeps_the_lock(work: WorkFolder) -> None:
    work.save_states(1, tables(1))
    work.clear()
    assert names(work.folder) == ["lock"] and not work.unfinished()
    with pytest.raises(ErnieQuantError, match="another run"):
        WorkFolder(work.folder)
    work.begin({"--bits": 4})
    assert work.load_states(tables(1)) == 0


# Made by the run; there before; there before, but by its name ours: left by a run that was killed.
@pytest.mark.parametrize(
    ("name", "before", "stays"),
    [("w", False, False), ("w", True, True), (WORK_FOLDER, True, False)],
)
def test_the_folder_goes_unless_someone_else_made_it(
    tmp_path: Path, name: str, before: bool, stays: bool
) -> None:
    folder = tmp_path / name
    if before:
        folder.mkdir()
    for begun in (False, True):
        work = WorkFolder(folder)
        if begun:
            work.begin(IDENTITY)
            work.save_states(1, tables(1))
            work.remove()
            assert folder.exists() == stays
        work.release()
        assert folder.exists() == stays and (not stays or names(folder) == [])


@pytest.mark.parametrize("done", range(4))
def test_removal_cut_short_leaves_a_run_that_can_go_on_or_none(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    work.save_states(1, tables(1))
    (work.folder / ".states-00002.f32.partial").write_bytes(b"x")
    unlink, deleted = Path.unlink, []

    def dying(path: Path) -> None:
        if len(deleted) == done:
            raise KeyboardInterrupt
        deleted.append(path)
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            work.remove()
    assert len(names(work.folder)) == 4 - done
    # Without its journal nothing may stay that makes the folder look begun.
    assert work.unfinished() or names(work.folder) == ["lock"]


def test_an_end_does_not_take_the_lock_of_the_next_run(tmp_path: Path) -> None:
    # In a folder that stays, another run may begin as soon as the first has removed its files.
    first = WorkFolder(tmp_path)
    first.begin(IDENTITY)
    first.remove()
    second = WorkFolder(tmp_path)
    first.release()
    with pytest.raises(ErnieQuantError, match="another run"):
        WorkFolder(tmp_path)
    second.release()


def test_a_second_run_is_refused_and_touches_nothing(work: WorkFolder) -> None:
    work.save_states(1, tables(1))
    before = {path.name: path.read_bytes() for path in work.folder.iterdir()}
    with pytest.raises(ErnieQuantError, match=f"pid {os.getpid()} "):
        WorkFolder(work.folder)
    assert {path.name: path.read_bytes() for path in work.folder.iterdir()} == before


def test_a_disk_that_refuses_is_one_line(tmp_path: Path, read_only: ReadOnly) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/work"):
        with pytest.raises(ErnieQuantError, match=rf"^cannot write .*/{place}: (File|Not a) .*\Z"):
            WorkFolder(tmp_path / place)
    with read_only(), pytest.raises(ErnieQuantError, match=r"^cannot write w: Permission .*\Z"):
        WorkFolder(Path("w"))
    work = WorkFolder(Path())
    work.begin(IDENTITY)
    work.save_states(1, tables(1))
    with read_only():
        for call, verb in (
            (lambda: work.save_states(2, tables(2)), "write"),
            (work.clear, "delete"),
            (work.remove, "delete"),
        ):
            with pytest.raises(ErnieQuantError, match=rf"^cannot {verb} \S+: Permission .*\Z"):
                call()
        work.release()
    again = WorkFolder(Path())
    again.begin(IDENTITY)
    assert again.load_states(tables(1)) == 1
    again.release()


def test_a_folder_that_vanishes_ends_in_silence(work: WorkFolder) -> None:
    for path in work.folder.iterdir():
        path.unlink()
    work.folder.rmdir()
    with pytest.raises(ErnieQuantError, match=r"^cannot write .*: No such file or directory; .*\Z"):
        work.save_states(1, tables(1))
    work.clear()
    work.remove()
    work.release()
