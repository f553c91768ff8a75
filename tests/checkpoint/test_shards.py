"""Shards filled part by part: in any order, over several sessions, on disks that refuse."""

import errno
import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erniequant.checkpoint import shards as shards_module
from erniequant.checkpoint.layout import OutputTensor, PlannedShard, plan_shards
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.checkpoint.shards import ShardFiles
from erniequant.errors import ErnieQuantError
from tests.checkpoint.tensors import Stored, awkward_tensors, bits_of, planned, write_stored
from tests.conftest import FileLimit, ReadOnly

ROWS = {
    # Three dimensions; a row of three bytes; one row; a shard of its own.
    "cube": torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "bytes": torch.arange(33, dtype=torch.uint8).view(11, 3),
    "one": torch.arange(4, dtype=torch.int32).view(1, 4),
    "wide": torch.randn(6, 40, generator=torch.Generator().manual_seed(2)),
}


def shards_of_rows() -> tuple[PlannedShard, ...]:
    shards = planned(ROWS, 300)
    assert [len(shard.tensors) for shard in shards] == [3, 1]
    return shards


def fill(files: ShardFiles) -> None:
    for name, tensor in ROWS.items():
        files.write(name, tensor)


def read_all(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {name: bits_of(tensor) for name, tensor in load_file(path).items()}
    return found


def expected() -> dict[str, bytes]:
    return {name: bits_of(tensor) for name, tensor in ROWS.items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_may_be_written_in_any_order(tmp_path: Path, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    pieces = [(name, start) for name, t in ROWS.items() for start in range(0, len(t), rows)]
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            name, start = pieces[place]
            files.write(name, ROWS[name][start : start + rows], start)
        for shard in files.shards:
            files.finish(shard)
    assert read_all(tmp_path) == expected()


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        fill(files)
        # Transposed, and of every second row; with a gradient.
        files.write("wide", ROWS["wide"].T.contiguous().T.requires_grad_())
        files.write("bytes", torch.stack([ROWS["bytes"]] * 2, 1).view(22, 3)[::2])
        for shard in files.shards:
            files.finish(shard)
    assert read_all(tmp_path) == expected()


# Bytes of a block: one, an odd number that divides no tensor, exactly one of them, more than all.
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_tensors_are_copied_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(shards_module, "COPY_BLOCK", block)
    stored: dict[str, Stored] = {
        # 37 bytes are five blocks of 7 and a rest; torch has no U32.
        "odd": ("U8", (37,), bytes(range(37))),
        "unknown": ("U32", (16,), bytes(range(64))),
        "empty": ("F32", (0, 5), b""),
        "scalar": ("BF16", (), b"\x80\x3f"),
    }
    (tmp_path / "source").mkdir()
    write_stored(tmp_path / "source" / "model.safetensors", stored)
    source = open_checkpoint(tmp_path / "source")
    shards = plan_shards([OutputTensor.copy_of(h) for h in source.headers.values()], 40)
    assert len(shards) == 3
    with ShardFiles(tmp_path, shards) as files:
        files.prepare()
        for name in reversed(source.names()):
            files.copy(name, source)
        for shard in shards:
            files.finish(shard)
    assert read_all(tmp_path) == {name: content for name, (_, _, content) in stored.items()}


def test_rows_are_read_back_before_and_after_the_end(tmp_path: Path) -> None:
    def check(files: ShardFiles) -> None:
        for name, tensor in ROWS.items():
            for row in range(len(tensor)):
                for rows in range(len(tensor) - row + 1):
                    assert files.read(name, row, rows) == bits_of(tensor[row : row + rows])

    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        fill(files)
        check(files)
        # One partial, one finished.
        files.finish(files.shards[0])
        check(files)


def test_rows_beyond_the_planned_ones_are_refused_and_harm_no_neighbour(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        fill(files)
        for name, tensor in ROWS.items():
            ones = torch.ones_like(tensor)
            for row, part in ((len(ones), ones[:1]), (1, ones), (-1, ones[:1])):
                with pytest.raises(ValueError, match=f"{name}: rows from {row} do not fit"):
                    files.write(name, part, row)
            # As many rows, but of wider numbers.
            with pytest.raises(ValueError, match=f"{name}: rows from 0 do not fit"):
                files.write(name, ones.double())
        for shard in files.shards:
            files.finish(shard)
    assert read_all(tmp_path) == expected()


def test_scalars_and_empty_tensors_have_a_place(tmp_path: Path) -> None:
    tensors = awkward_tensors()
    with ShardFiles(tmp_path, planned(tensors)) as files:
        files.prepare()
        for name in ("empty", "scalar", "fp64 scalar"):
            files.write(name, tensors[name])
        with pytest.raises(ValueError, match="scalar: rows"):
            files.write("scalar", torch.zeros(2))
        files.finish(files.shards[0])
    found = load_file(tmp_path / "model.safetensors")
    assert bits_of(found["fp64 scalar"]) == bits_of(tensors["fp64 scalar"])
    assert found["scalar"].item() == 2.5 and found["empty"].shape == (0, 3)


def test_another_session_goes_on_with_a_shard_of_the_right_size(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        fill(files)
        files.finish(files.shards[1])
    finished = (tmp_path / files.shards[1].file).stat()
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        files.write("one", ROWS["one"])
        files.finish(files.shards[0])
    again = (tmp_path / files.shards[1].file).stat()
    assert (again.st_ino, again.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)
    assert read_all(tmp_path) == expected()
    assert names(tmp_path) == [shard.file for shard in files.shards]


# Nothing, cut after the header, one byte short, one byte long; and of the right size, but with a
# header that never reached the disk: the power went between making room and flushing.
@pytest.mark.parametrize("size", [0, None, -1, 1, "zeros"])
def test_a_partial_that_was_not_made_to_its_end_is_made_anew(
    tmp_path: Path, size: int | str | None
) -> None:
    shard = shards_of_rows()[0]
    whole = shard.header + b"\xaa" * (shard.n_bytes - len(shard.header))
    left = {
        0: b"", None: shard.header, -1: whole[:-1], 1: whole + b"\xaa", "zeros": bytes(len(whole))
    }[size]  # fmt: skip
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.partial(shard).write_bytes(left)
        files.prepare()
        assert files.partial(shard).read_bytes() == shard.header + bytes(33 + 16 + 210)
        fill(files)
        for shard in files.shards:
            files.finish(shard)
    assert read_all(tmp_path) == expected()


def test_only_finished_shards_have_their_names(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        first, second = files.shards
        assert not files.finished(first)
        files.prepare()
        fill(files)
        files.sync(["wide", "cube"])
        assert list(tmp_path.glob("*.safetensors")) == [] and not files.finished(first)
        files.finish(second)
        assert files.finished(second) and not files.finished(first)
        assert [p.name for p in tmp_path.glob("*.safetensors")] == [second.file]


def test_finishing_twice_changes_nothing(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        fill(files)
        digests = [files.finish(shard) for shard in files.shards]
        assert digests == [files.finish(shard) for shard in files.shards]
    assert digests == [
        hashlib.sha256((tmp_path / shard.file).read_bytes()).hexdigest() for shard in files.shards
    ]
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        assert digests == [files.finish(shard) for shard in files.shards]
    assert read_all(tmp_path) == expected()


def test_removal_takes_partial_and_finished_shards_but_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model-00003-of-00003.safetensors").write_text("mine")
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        files.finish(files.shards[0])
        files.remove()
        files.remove()
    assert names(tmp_path) == ["model-00003-of-00003.safetensors"]


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(KeyboardInterrupt), ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        fill(files)
        raise KeyboardInterrupt
    assert len(os.listdir("/dev/fd")) == before


def test_a_disk_without_room_for_a_shard_says_so_before_anything_is_filled(
    tmp_path: Path, files_of_at_most: FileLimit
) -> None:
    shards = shards_of_rows()
    small, large = sorted(shard.n_bytes for shard in shards)
    assert small < large
    path = re.escape(f"{tmp_path}/.{shards[1].file}.partial")
    with ShardFiles(tmp_path, shards) as files:
        with (
            files_of_at_most(large - 1),
            pytest.raises(ErnieQuantError, match=rf"^cannot write {path}: File too large; .*\Z"),
        ):
            files.prepare()
        # What fitted is there to be gone on with.
        assert names(tmp_path) == [files.partial(shards[0]).name]


def test_a_disk_that_fails_while_a_shard_is_filled_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    refused = pytest.raises(ErnieQuantError, match=r"^cannot write .*: Input/output error; .*\Z")
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        monkeypatch.setattr(os, "fdatasync", fail)
        with refused:
            files.sync(["wide"])
        with refused:
            files.finish(files.shards[0])
        assert list(tmp_path.glob("*.safetensors")) == []
        monkeypatch.setattr(os, "pwrite", fail)
        with refused:
            files.write("wide", ROWS["wide"])


def test_writes_that_the_system_cuts_short_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux takes at most 2 GiB at a time.
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:11], at))
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        fill(files)
        for shard in files.shards:
            files.finish(shard)
    assert read_all(tmp_path) == expected()


@pytest.mark.parametrize("behind", ["nothing", "a file"])
def test_a_vanished_folder_is_one_line(tmp_path: Path, behind: str) -> None:
    folder = tmp_path / "q"
    folder.mkdir()
    with ShardFiles(folder, shards_of_rows()) as opened:
        opened.prepare()
        fill(opened)
        shutil.rmtree(folder)
        if behind == "a file":
            folder.write_text("mine")
        gone = r": (No such file or directory|Not a directory); check space and permissions\Z"
        # The shard is open, so that its name fails and not its bytes.
        with pytest.raises(ErnieQuantError, match=f"^cannot write .*{gone}"):
            opened.finish(opened.shards[0])
        with ShardFiles(folder, shards_of_rows()) as files:
            for call in (
                files.prepare,
                lambda: files.write("one", ROWS["one"]),
                lambda: files.sync(["one"]),
                lambda: files.finish(files.shards[0]),
            ):
                with pytest.raises(ErnieQuantError, match=f"^cannot write .*{gone}"):
                    call()
            with pytest.raises(ErnieQuantError, match=f"^cannot read .*{gone}"):
                files.read("one", 0, 1)
            files.remove()
    assert names(tmp_path) == ([] if behind == "nothing" else ["q"])


def test_a_vanished_source_is_one_line(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_stored(source / "model.safetensors", {"one": ("I32", (1, 4), bytes(16))})
    checkpoint = open_checkpoint(source)
    os.truncate(source / "model.safetensors", 20)
    with ShardFiles(tmp_path, shards_of_rows()) as files:
        files.prepare()
        refused = r"^cannot read .*/source/model.safetensors: the file ends at byte .*\Z"
        with pytest.raises(ErnieQuantError, match=refused):
            files.copy("one", checkpoint)
        shutil.rmtree(source)
        with pytest.raises(ErnieQuantError, match=r"^cannot read .*: No such file or directory;"):
            files.copy("one", checkpoint)


def test_a_read_only_folder_is_one_line(read_only: ReadOnly) -> None:
    denied = r"^cannot {} \S+: Permission denied; check space and permissions\Z"
    with ShardFiles(Path(), shards_of_rows()) as files:
        with read_only(), pytest.raises(ErnieQuantError, match=denied.format("write")):
            files.prepare()
        files.prepare()
        fill(files)
        with read_only():
            with pytest.raises(ErnieQuantError, match=denied.format("write")):
                files.finish(files.shards[0])
            with pytest.raises(ErnieQuantError, match=denied.format("delete")):
                files.remove()
        # Once it can be written, everything is still there.
        for shard in files.shards:
            files.finish(shard)
    assert read_all(Path()) == expected()
