"""A file is there as a whole or not at all, whatever the disk does."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erniequant.checkpoint.files import (
    delete,
    disk_error,
    sha256_of,
    sync_folder,
    write_file,
    write_json,
)
from erniequant.errors import ErnieQuantError
from tests.conftest import FileLimit, ReadOnly

OLD, NEW = b"what was there before", b"what comes instead, and is longer"


def refuse(*_: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("before", [{}, {"a.bin": OLD}])
def test_a_file_appears_as_a_whole(tmp_path: Path, before: dict[str, bytes]) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)

    def write(file: Any) -> None:
        file.write(NEW[:5])
        file.flush()
        assert {n: d for n, d in contents(tmp_path).items() if not n.startswith(".")} == before
        file.write(NEW[5:])

    write_file(tmp_path / "a.bin", write)
    assert contents(tmp_path) == {"a.bin": NEW}


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        inode = os.fstat(descriptor).st_ino
        seen.append("folder" if inode == tmp_path.stat().st_ino else f"{size} bytes")
        fsync(descriptor)

    def note_replace(old: Path, new: Path) -> None:
        seen.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_file(tmp_path / "a.bin", lambda file: file.write(NEW))
    assert seen == [f"{len(NEW)} bytes", "name", "folder"]


@pytest.mark.parametrize("before", [{}, {"a.bin": OLD}])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_nothing_is_left_of_a_file_that_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, bytes], call: str
) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    if call != "write":
        monkeypatch.setattr(os, call, refuse)

    def write(file: Any) -> None:
        file.write(NEW)
        if call == "write":
            refuse()

    path = re.escape(str(tmp_path / "a.bin"))
    refused = rf"^cannot write {path}: Input/output error; check space and permissions\Z"
    with pytest.raises(ErnieQuantError, match=refused):
        write_file(tmp_path / "a.bin", write)
    assert contents(tmp_path) == before


# Within one write, and more than Python holds back before it asks the system.
@pytest.mark.parametrize("size", [1000, 100_000])
def test_nothing_is_left_on_a_full_disk(
    tmp_path: Path, files_of_at_most: FileLimit, size: int
) -> None:
    (tmp_path / "a.json").write_bytes(OLD)
    refused = pytest.raises(ErnieQuantError, match=r"^cannot write .*: File too large; .*\Z")
    with files_of_at_most(size), refused:
        write_json(tmp_path / "a.json", {"text": "x" * size})
    assert contents(tmp_path) == {"a.json": OLD}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, read_only: ReadOnly) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, reason in (("file", "Not a directory"), ("nothing", "No such file or directory")):
        with pytest.raises(ErnieQuantError, match=rf"^cannot write .*: {reason}; .*\Z"):
            write_json(tmp_path / folder / "a.json", {})
        delete(tmp_path / folder / "a.json")
    Path("a.json").write_bytes(OLD)
    with read_only():
        with pytest.raises(ErnieQuantError, match=r"^cannot write a.json: Permission denied; .*\Z"):
            write_json(Path("a.json"), {})
        with pytest.raises(ErnieQuantError, match=r"^cannot delete a.json: Permission denied;"):
            delete(Path("a.json"))
    assert contents(Path()) == {"a.json": OLD}


def test_json_is_for_people_to_read(tmp_path: Path) -> None:
    value = {"model": "文心 4.5 – größer", "layers": {"1": [1, 2.5, None, True]}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert json.loads(text) == value
    assert "文心 4.5 – größer" in text and text.endswith("}\n") and '\n  "layers"' in text


def test_what_is_not_json_touches_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(OLD)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path})
    assert contents(tmp_path) == {"a.json": OLD}


@pytest.mark.parametrize("sync", [os.fsync, refuse])
def test_folders_that_cannot_be_flushed_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: Callable[..., None]
) -> None:
    # Some network file systems refuse; no descriptor may leak either way.
    monkeypatch.setattr(os, "fsync", sync)
    before = len(os.listdir("/dev/fd"))
    sync_folder(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


# Nothing, one block exactly, and one byte more.
@pytest.mark.parametrize("size", [0, 1 << 20, (1 << 20) + 1])
def test_the_hash_is_that_of_the_whole_file(tmp_path: Path, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "a.bin").write_bytes(data[:size])
    assert sha256_of(tmp_path / "a.bin") == hashlib.sha256(data[:size]).hexdigest()


def test_an_error_without_a_reason_of_the_system_gives_its_own() -> None:
    assert str(disk_error(Path("a"), ValueError("odd"), "read")) == (
        "cannot read a: odd; check space and permissions"
    )
