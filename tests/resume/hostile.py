"""Damage to what an unfinished run left: its journal, hidden states and shards."""

import json
import random
import zlib
from pathlib import Path
from typing import Any

ODD_VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    10**30,
    0.5,
    "",
    "x",
    "../x",
    [],
    {},
    [[]],
    {"error": "x"},
]


def damage(work: Path, partial: Path, rng: random.Random) -> str:
    """Damage one file; returns what was done."""
    journal = work / "journal.jsonl"
    kind = rng.choice(["flip", "cut", "line", "line", "line", "value", "value", "value", "other"])
    if kind == "flip":
        return _flip(journal, rng)
    if kind == "cut":
        size = rng.randrange(journal.stat().st_size)
        journal.write_bytes(journal.read_bytes()[:size])
        return f"journal cut at {size}"
    if kind == "other":
        files = [partial, *work.glob("states-*"), work / "lock"]
        return _flip(rng.choice(files), rng)
    lines = journal.read_bytes().splitlines()
    number = rng.randrange(len(lines))
    done = _lines(lines, number, rng) if kind == "line" else _value(lines, number, rng)
    journal.write_bytes(b"".join(line + b"\n" for line in lines))
    return f"journal line {number + 1}: {done}"


def _flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    data[place] ^= bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {place}"


def _lines(lines: list[bytes], number: int, rng: random.Random) -> str:
    kind = rng.choice(["drop", "twice", "swap", "rubbish"])
    if kind == "drop":
        del lines[number]
    elif kind == "twice":
        lines.insert(rng.randrange(len(lines)), lines[number])
    elif kind == "swap":
        other = rng.randrange(len(lines))
        lines[number], lines[other] = lines[other], lines[number]
    else:
        lines[number] = bytes(rng.randrange(256) for _ in range(20)).replace(b"\n", b"")
    return kind


def _value(lines: list[bytes], number: int, rng: random.Random) -> str:
    """Another value or none under some key, with a checksum that is right."""
    entry: dict[str, Any] = json.loads(lines[number].partition(b" ")[2])
    inner = [entry, *(value for value in entry.values() if isinstance(value, dict) and value)]
    place = rng.choice(inner)
    key = rng.choice(list(place))
    value = rng.choice([*ODD_VALUES, "drop", rng.choice(list(place.values()))])
    if value == "drop":
        del place[key]
    else:
        place[key] = value
    text = json.dumps(entry, separators=(",", ":")).encode()
    lines[number] = b"%08x %s" % (zlib.crc32(text), text)
    return f"{key} = {value!r}"
