"""One holder at a time, who is named to others, and whose death opens the lock."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from erniequant.errors import ErnieQuantError
from erniequant.resume.lock import Lock
from tests.conftest import ReadOnly


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def refusal(path: Path, pid: int | str, host: str | None = None) -> Any:
    words = f"another run (pid {pid} on {host or socket.gethostname()}) is at work in {path.parent}"
    return pytest.raises(ErnieQuantError, match=rf"^{re.escape(words)}; .*\Z")


@contextmanager
def another_process(path: Path) -> Iterator[int]:
    """The pid of a child that holds the lock until it is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = Lock(path)
            os.write(writing, b"!")
            while held:
                signal.pause()
        finally:
            os._exit(1)  # whatever happens, it is not to go on with the tests
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"!"
        yield child
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_second_lock_in_one_process_is_refused(path: Path) -> None:
    lock = Lock(path)
    for _ in range(2):
        with refusal(path, os.getpid()):
            Lock(path)
    lock.release()
    Lock(path).release()


def test_another_process_is_named_and_its_death_opens_the_lock(path: Path) -> None:
    with another_process(path) as child:
        assert child != os.getpid()
        with refusal(path, child):
            Lock(path)
    lock = Lock(path)
    assert json.loads(path.read_bytes()) == {"pid": os.getpid(), "host": socket.gethostname()}
    lock.release()


def test_a_refused_lock_leaves_the_holder_its_lock_and_no_open_file(path: Path) -> None:
    lock = Lock(path)
    before = len(os.listdir("/dev/fd"))
    content = path.read_bytes()
    with refusal(path, os.getpid()):
        Lock(path)
    assert path.read_bytes() == content and len(os.listdir("/dev/fd")) == before
    with refusal(path, os.getpid()):
        Lock(path)
    lock.release()


def test_programs_that_the_holder_starts_do_not_keep_the_lock(path: Path) -> None:
    lock = Lock(path)
    assert not any(os.get_inheritable(int(fd)) for fd in os.listdir("/dev/fd") if _is(fd, path))
    assert any(_is(fd, path) for fd in os.listdir("/dev/fd"))
    lock.release()
    assert not any(_is(fd, path) for fd in os.listdir("/dev/fd"))


def _is(descriptor: str, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(int(descriptor)), path.stat())
    except OSError:
        return False  # the listing's own


def test_releasing_twice_closes_no_other_file(path: Path) -> None:
    lock = Lock(path)
    lock.release()
    other = os.open(path, os.O_RDONLY)  # takes the number that was the lock's
    lock.release()
    os.close(other)


# Not text, JSON of another kind, longer than what is written, and a holder without a name.
@pytest.mark.parametrize("garbage", [b"\xff\x00\x80", b"[1, 2]", b"x" * 5000, b"", b"{}"])
def test_a_lock_file_with_garbage_does_not_matter(path: Path, garbage: bytes) -> None:
    path.write_bytes(garbage)
    lock = Lock(path)
    assert json.loads(path.read_bytes())["pid"] == os.getpid()
    with refusal(path, os.getpid()):
        Lock(path)
    path.write_bytes(garbage)
    with refusal(path, "unknown", "an unknown host"):
        Lock(path)
    lock.release()


def test_a_lock_file_that_goes_while_it_is_locked_is_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The holder finishes, deletes its file and lets go of it, all after we have opened it.
    flock, calls = fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not calls:
            path.unlink()
        calls.append(kind)
        flock(descriptor, kind)

    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(fcntl, "flock", late)
    lock = Lock(path)
    with refusal(path, os.getpid()):
        Lock(path)
    lock.release()
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_system_without_locks_is_not_taken_for_another_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ErnieQuantError, match=r"^cannot lock .*/lock: No locks available; .*\Z"):
        Lock(path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, read_only: ReadOnly) -> None:
    with pytest.raises(ErnieQuantError, match=r"^cannot write .*/gone/lock: No such file .*\Z"):
        Lock(tmp_path / "gone" / "lock")
    with read_only(), pytest.raises(ErnieQuantError, match=r"^cannot write lock: Permission .*\Z"):
        Lock(Path("lock"))
