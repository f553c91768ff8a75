"""An append-only record of what is finished, one JSON object per line, each behind its checksum.

A line is written only when what it speaks of is on the disk. The process may die while writing
one: a last line that is cut short or wrong never happened.
"""

import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erniequant.checkpoint.files import disk_error, write_file
from erniequant.errors import ErnieQuantError

JOURNAL_VERSION = 1


class Journal:
    """The journal of one run.

    Attributes:
        identity: the facts in which a continuation must agree, by name.
        events: everything recorded, oldest first; ``event`` says what, ``t`` when, in seconds
            from the beginning of its session.
    """

    def __init__(self, path: Path, identity: dict[str, Any], events: list[dict[str, Any]]):
        self.path, self.identity, self.events = path, identity, events
        self._started = time.perf_counter()

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any]) -> "Journal":
        """Begin a journal. Raises ErnieQuantError if it cannot be written."""
        head = {"event": "run", "journal_version": JOURNAL_VERSION, "identity": identity}
        write_file(path, lambda file: file.write(_line(head)))
        return cls(path, identity, [])

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Read a journal, cutting off an unfinished last line.

        Raises:
            ErnieQuantError: damaged in another place than its end, or of another version.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise disk_error(path, error, "read") from error
        lines = data.split(b"\n")
        whole, events = 0, []
        for number, line in enumerate(lines[:-1], start=1):
            event = _parse(line)
            if event is None:
                if number < len(lines) - 1:
                    raise ErnieQuantError(f"{path} line {number} is damaged; use --restart")
                break
            events.append(event)
            whole += len(line) + 1
        if not events or events[0].get("event") != "run":
            raise ErnieQuantError(f"{path} is damaged: it has no first line; use --restart")
        version, identity = events[0].get("journal_version"), events[0].get("identity")
        if version != JOURNAL_VERSION or not isinstance(identity, dict):
            raise ErnieQuantError(
                f"{path} has version {version!r}, this erniequant continues {JOURNAL_VERSION}; "
                "use the version that began the run, or --restart"
            )
        if whole < len(data):
            try:
                os.truncate(path, whole)
            except OSError as error:
                raise disk_error(path, error) from error
        return cls(path, identity, events[1:])

    def append(self, event: str, **facts: Any) -> None:
        """Record an event; on return it is on the disk.

        Raises:
            ErnieQuantError: the disk refuses; the event never happened then.
        """
        entry = {"event": event, "t": round(time.perf_counter() - self._started, 3), **facts}
        try:
            end = self.path.stat().st_size
            try:
                with self.path.open("ab") as file:
                    file.write(_line(entry))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, end)  # half a line would spoil the next
                raise
        except OSError as error:
            raise disk_error(self.path, error) from error
        self.events.append(entry)

    def of(self, event: str) -> list[dict[str, Any]]:
        """All events of a kind, oldest first."""
        return [entry for entry in self.events if entry["event"] == event]

    def require(self, facts: Mapping[str, Mapping[str, type]]) -> None:
        """Refuse events of other kinds than those of ``facts``, or without their facts.

        Raises:
            ErnieQuantError: names the first.
        """
        for number, entry in enumerate(self.events, start=2):
            wanted = facts.get(entry["event"])
            if wanted is None or not all(_is(entry.get(n), kind) for n, kind in wanted.items()):
                raise ErnieQuantError(f"{self.path} line {number} is damaged; use --restart")

    def seconds(self) -> float:
        """Time worked in all sessions, up to the last event of each."""
        worked = self._worked()
        return worked[-1] if worked else 0.0

    def seconds_of(self, event: str) -> list[float]:
        """The same up to each event of a kind."""
        pairs = zip(self.events, self._worked(), strict=True)
        return [worked for entry, worked in pairs if entry["event"] == event]

    def _worked(self) -> list[float]:
        total = last = 0.0
        times = []
        for entry in self.events:
            if entry["event"] == "session":
                total += last
            last = entry["t"]
            times.append(total + last)
        return times


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    sound = isinstance(entry, dict) and isinstance(entry.get("event"), str)
    timed = sound and (entry["event"] == "run" or isinstance(entry.get("t"), float | int))
    return entry if timed else None


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
