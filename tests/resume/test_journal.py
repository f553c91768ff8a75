"""The journal forgets what was cut short, refuses what is damaged, and keeps everything else."""

import errno
import json
import os
import re
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from erniequant.errors import ErnieQuantError
from erniequant.resume.journal import Journal
from tests.conftest import FileLimit

IDENTITY = {"--bits": 2, "the source's config.json": "ab" * 32, "umlaut": "ü"}
# A fact of each kind that JSON knows; a line break inside must not end the line.
EVENTS: list[dict[str, Any]] = [
    {"event": "session"},
    {"event": "expert", "layer": 1, "error": 0.1 + 0.2, "fallback": None, "facts": {"a": [1, {}]}},
    {"event": "expert", "layer": 2, "text": 'two\nlines, "quoted", größer \u2028', "on": True},
    {"event": "layer", "disk_bytes": 2**53 + 1},
]


def line(entry: Any) -> bytes:
    """A line as the journal's format says, made independently of it."""
    text = json.dumps(entry).encode()
    return f"{zlib.crc32(text) & 0xFFFFFFFF:08x} ".encode() + text + b"\n"


def head(**changes: Any) -> bytes:
    return line({"event": "run", "journal_version": 1, "identity": IDENTITY} | changes)


def facts(journal: Journal) -> list[dict[str, Any]]:
    """All events without their times."""
    assert all(isinstance(event["t"], float) for event in journal.events)
    return [{k: v for k, v in event.items() if k != "t"} for event in journal.events]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with `EVENTS`."""
    journal = Journal.create(tmp_path / "journal.jsonl", IDENTITY)
    for event in EVENTS:
        journal.append(**event)
    assert facts(journal) == EVENTS and journal.identity == IDENTITY
    return journal.path


def test_everything_survives_reopening(path: Path) -> None:
    before = path.read_bytes()
    for sessions in range(3):
        journal = Journal.open(path)
        assert journal.identity == IDENTITY
        assert facts(journal) == EVENTS + [{"event": "again"}] * sessions
        assert [e["layer"] for e in journal.of("expert")] == [1, 2] and journal.of("other") == []
        journal.append("again")
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 8


def test_a_line_that_others_wrote_by_the_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(head() + line({"event": "layer", "t": 3, "layer": 0}))
    assert Journal.open(path).events == [{"event": "layer", "t": 3, "layer": 0}]


def test_a_torn_last_line_is_cut_off_and_the_next_takes_its_place(path: Path) -> None:
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    assert len(data) - start > 40
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        journal = Journal.open(path)
        assert facts(journal) == EVENTS[:-1]
        assert path.read_bytes() == data[:start]
        journal.append("other", number=end)
        assert facts(Journal.open(path)) == [*EVENTS[:-1], {"event": "other", "number": end}]


def test_a_last_line_that_is_wrong_is_cut_off(path: Path) -> None:
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    # One bit flipped in the checksum, the blank, the text; zeros, as after a power cut.
    for place in (start, start + 7, start + 8, start + 9, len(data) - 3):
        wrong = bytearray(data)
        wrong[place] ^= 1
        path.write_bytes(wrong)
        assert facts(Journal.open(path)) == EVENTS[:-1]
        assert path.read_bytes() == data[:start]
    path.write_bytes(data[:start] + bytes(len(data) - start))
    assert facts(Journal.open(path)) == EVENTS[:-1]
    # Sound, but no event: nothing that this journal wrote.
    for entry in ([1], {"t": 1.0}, {"event": "layer"}, {"event": 3, "t": 1.0}):
        path.write_bytes(data[:start] + line(entry))
        assert facts(Journal.open(path)) == EVENTS[:-1]


def test_a_damaged_line_in_the_middle_is_refused_by_its_number(path: Path) -> None:
    data = path.read_bytes()
    lines = data.split(b"\n")[:-1]
    for number, damaged in enumerate(lines[:-1], start=1):
        for place in (0, len(damaged) // 2, len(damaged) - 1):
            wrong = bytearray(damaged)
            wrong[place] ^= 1
            changed = [*lines[: number - 1], bytes(wrong), *lines[number:], b""]
            path.write_bytes(b"\n".join(changed))
            refused = rf"^{re.escape(str(path))} line {number} is damaged; use --restart\Z"
            with pytest.raises(ErnieQuantError, match=refused):
                Journal.open(path)
            # Nothing is cut off: someone may want to look.
            assert path.read_bytes() == b"\n".join(changed)
    path.write_bytes(b"\n".join([*lines[:2], b"", *lines[2:], b""]))
    with pytest.raises(ErnieQuantError, match="line 3 is damaged"):
        Journal.open(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", head()[:-1], head()[:20], b"0" + head()[1:], line({"event": "layer", "t": 1.0})],
)
def test_a_journal_without_its_first_line_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    with pytest.raises(ErnieQuantError, match=r"has no first line; use --restart\Z"):
        Journal.open(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("changes", "version"),
    [({"journal_version": 2}, "2"), ({"journal_version": None}, "None"), ({"identity": []}, "1")],
)
def test_another_version_is_refused(tmp_path: Path, changes: dict[str, Any], version: str) -> None:
    path = tmp_path / "journal.jsonl"
    data = head(**changes) + b"torn"
    path.write_bytes(data)
    refused = rf"^{re.escape(str(path))} has version {version}, this erniequant continues 1; .*\Z"
    with pytest.raises(ErnieQuantError, match=refused):
        Journal.open(path)
    assert path.read_bytes() == data


def test_time_counts_over_all_sessions_up_to_their_last_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, IDENTITY)
    assert journal.seconds() == 0
    # Work of 7.5 s, then a kill; a session that does nothing but begin; 2 s of which 0.5 begin.
    for begin, steps in ((0.0, (3.0, 4.5)), (0.25, ()), (0.5, (1.5,))):
        now[0] += begin
        journal.append("session")
        for step in steps:
            now[0] += step
            journal.append("expert")
        now[0] += 100  # until the kill, and until someone starts it again
        journal = Journal.open(path)
    assert journal.seconds() == 7.5 + 0.25 + 2.0


def test_an_event_that_the_disk_refuses_never_happened(
    path: Path, files_of_at_most: FileLimit
) -> None:
    whole = path.read_bytes()
    journal = Journal.open(path)
    # Room for no byte of it, and for half a line.
    for room in (0, 20):
        refused = rf"^cannot write {re.escape(str(path))}: File too large; .*\Z"
        with files_of_at_most(len(whole) + room), pytest.raises(ErnieQuantError, match=refused):
            journal.append("large", text="x" * 1000)
        assert facts(journal) == EVENTS
        assert facts(Journal.open(path)) == EVENTS
    # With room again, the same session may go on.
    with files_of_at_most(len(whole) + 20), pytest.raises(ErnieQuantError, match=refused):
        journal.append("large", text="x" * 1000)
    journal.append("small")
    assert facts(Journal.open(path)) == [*EVENTS, {"event": "small"}]


def test_an_event_is_flushed_before_it_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path)
    before = path.read_bytes()
    flushed = []

    def note(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_size)
        assert facts(journal) == EVENTS

    monkeypatch.setattr(os, "fsync", note)
    journal.append("layer")
    assert flushed == [path.stat().st_size] and flushed[0] > len(before)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ErnieQuantError, match="Input/output error"):
        journal.append("layer")
    assert facts(journal) == facts(Journal.open(path)) == [*EVENTS, {"event": "layer"}]


def test_a_journal_that_cannot_be_made_or_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "journal.jsonl"
    gone = r".*/gone/journal.jsonl: No such file or directory; .*\Z"
    with pytest.raises(ErnieQuantError, match=f"^cannot write {gone}"):
        Journal.create(path, IDENTITY)
    with pytest.raises(ErnieQuantError, match=f"^cannot read {gone}"):
        Journal.open(path)
    with pytest.raises(ErnieQuantError, match=f"^cannot write {gone}"):
        Journal(path, IDENTITY, []).append("layer")
