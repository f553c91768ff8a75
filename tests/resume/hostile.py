"""Damage to what an unfinished run left: its journal, hidden states and shards."""

import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

from tests.resume.kills import Driver, contents

KILL = 135
"""Of the 175 times that a run without training touches the disk, one in the second MoE layer."""

KILL_TRAINED = ("replace tuned-00002.safetensors", 2)
"""In a run that trains: the second MoE layer is trained, and the journal says so."""

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


def survive_damage(
    driver: Driver,
    source: Path,
    options: dict[str, Any],
    folder: Path,
    expected: dict[str, bytes],
    cases: int,
    seed: int,
    **kill: Any,
) -> tuple[int, int, list[str]]:
    """Damage what a killed run left, and go on: how often that was refused in one line, how often
    it gave the right bytes, and everything else, one line each."""
    base, dst = folder / "base", folder / "q"
    assert driver.run(source, base, options, **kill) == {"signal": 9}
    refused, right, problems = 0, 0, []
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        shutil.copytree(base, dst)
        done = damage(dst / ".erniequant-work", dst / ".model.safetensors.partial", rng)
        outcome = driver.run(source, dst, options)
        error = outcome.get("error", "")
        if outcome.get("ok") and contents(dst) == expected:
            right += 1
        elif error.isprintable() and str(folder) in error:
            refused += 1
        else:
            problems.append(f"seed {seed} case {case}, {done}: {outcome}")
        shutil.rmtree(dst)
    return refused, right, problems


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
        files = [partial, *work.glob("states-*"), *work.glob("tuned-*"), work / "lock"]
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
