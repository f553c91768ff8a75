"""Every byte of a source is read: no inf or nan gets by, and the hash is that of the file."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from erniequant.checkpoint import scan
from erniequant.checkpoint.reader import INDEX_FILE, Checkpoint, open_checkpoint
from erniequant.checkpoint.scan import CheckedShard, changed_shards, check_shard, check_shards
from erniequant.errors import ErnieQuantError
from tests.checkpoint.tensors import Stored, write_stored

SHARD = "model.safetensors"
# Bits by the definition of each type: inf and nan of both signs, nan with the first and the last
# bit of the mantissa; then the largest finite numbers, the smallest denormals, minus zero.
BITS: dict[str, tuple[str, list[int], list[int]]] = {
    "BF16": ("<u2", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF], [0x7F7F, 0xFF7F, 1, 0x8001, 0x8000]),
    "F16": ("<u2", [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF], [0x7BFF, 0xFBFF, 1, 0x8001, 0x8000]),
    "F32": (
        "<u4",
        [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
        [0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000001, 0x80000000],
    ),
    "F64": (
        "<u8",
        [0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, (0x7FF << 52) + 1, (1 << 64) - 1],
        [(0x7FF << 52) - 1, (0xFFF << 52) - 1, 1, (1 << 63) + 1, 1 << 63],
    ),
    # No inf, and one nan of each sign: 0x7E is 448.
    "F8_E4M3": ("u1", [0x7F, 0xFF], [0x7E, 0xFE, 1, 0x81, 0x80]),
    "F8_E5M2": ("u1", [0x7C, 0xFC, 0x7D, 0x7E, 0xFF], [0x7B, 0xFB, 1, 0x81, 0x80]),
}


def write(folder: Path, stored: dict[str, Stored], file: str = SHARD) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    write_stored(folder / file, stored)
    return open_checkpoint(folder)


def numbers(dtype: str, count: int, bad: int | None = None, place: int = 0) -> Stored:
    """Finite numbers of all kinds, of which one may be overwritten by bits."""
    kind, _, finite = BITS[dtype]
    found = np.resize(np.array(finite, kind), count)
    if bad is not None:
        found[place] = bad
    return dtype, (count,), found.tobytes()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", BITS)
def test_inf_and_nan_are_found_in_every_type_and_place(tmp_path: Path, dtype: str) -> None:
    for bad in BITS[dtype][1]:
        for place in (0, 6, 12):
            for name in ("first", "second"):
                stored = {other: numbers(dtype, 13) for other in ("first", "second")}
                stored[name] = numbers(dtype, 13, bad, place)
                checkpoint = write(tmp_path, stored)
                refused = rf"^{name} in {SHARD} holds inf or nan; .*\Z"
                with pytest.raises(ErnieQuantError, match=refused):
                    check_shard(checkpoint, SHARD)


@pytest.mark.parametrize("dtype", BITS)
def test_borders_of_blocks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(scan, "BLOCK", 24)
    # Up to a border of blocks of 24, 12, 6 or 3 elements, one less and one more.
    for count in (23, 24, 25):
        # Three bytes before it and five after each put all borders askew.
        stored = {"askew": ("U8", (3,), b"\xff" * 3), "weights": numbers(dtype, count)}
        checkpoint = write(tmp_path, stored)
        assert check_shard(checkpoint, SHARD).sha256 == sha256(tmp_path / SHARD)
        for place in range(count):
            stored["weights"] = numbers(dtype, count, BITS[dtype][1][0], place)
            checkpoint = write(tmp_path, stored)
            with pytest.raises(ErnieQuantError, match="weights in"):
                check_shard(checkpoint, SHARD)


def test_only_numbers_of_known_floating_types_are_looked_at(tmp_path: Path) -> None:
    ones = b"\xff" * 16
    integers = {"I64": 2, "I32": 4, "I16": 8, "I8": 16, "U8": 16, "U32": 4, "F4": 32}
    stored: dict[str, Stored] = {name: (name, (n,), ones) for name, n in integers.items()}
    stored |= {"BOOL": ("BOOL", (2,), b"\x01\x00"), "empty": ("F32", (0, 2), b"")}
    stored |= {"scalar": ("F64", (), numbers("F64", 1)[2])}
    checkpoint = write(tmp_path, stored)
    found = check_shard(checkpoint, SHARD)
    path = tmp_path / SHARD
    assert found == CheckedShard(SHARD, path.stat().st_size, path.stat().st_mtime_ns, sha256(path))
    assert CheckedShard(**json.loads(json.dumps(found.to_dict()))) == found


def test_an_empty_tensor_named_after_its_neighbour_does_not_change_the_hash(tmp_path: Path) -> None:
    # Both begin at the same byte; a header may name them in either order.
    stored: dict[str, Stored] = {
        "empty": ("F32", (0,), b""), "full": numbers("F32", 4), "last": numbers("F32", 2)
    }  # fmt: skip
    checkpoint = write(tmp_path, stored)
    assert checkpoint.headers["empty"].offset == checkpoint.headers["full"].offset
    order = ("full", "empty", "last")
    swapped = Checkpoint(tmp_path, {}, {name: checkpoint.headers[name] for name in order})
    assert check_shard(swapped, SHARD).sha256 == sha256(tmp_path / SHARD)


def sharded(folder: Path) -> Checkpoint:
    """Four files whose names do not sort in their order."""
    folder.mkdir()
    weight_map = {}
    for number, file in enumerate(("d", "a", "c", "b")):
        write_stored(folder / f"{file}.safetensors", {str(number): numbers("F32", 50 + number)})
        weight_map[str(number)] = f"{file}.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return open_checkpoint(folder)


def damage(folder: Path, file: str) -> None:
    """Put nan into the last number of a file."""
    path = folder / file
    path.write_bytes(path.read_bytes()[:-4] + b"\xff" * 4)


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_come_in_their_order_up_to_the_damaged_one(tmp_path: Path, threads: int) -> None:
    checkpoint = sharded(tmp_path / "m")
    found = list(check_shards(checkpoint, threads))
    assert [entry.file[0] for entry in found] == ["d", "a", "c", "b"]
    assert [entry.sha256 for entry in found] == [
        sha256(checkpoint.folder / entry.file) for entry in found
    ]
    damage(checkpoint.folder, "c.safetensors")
    rest = check_shards(checkpoint, threads)
    assert [next(rest), next(rest)] == found[:2]
    with pytest.raises(ErnieQuantError, match=r"^2 in c.safetensors holds inf or nan"):
        next(rest)


def test_shards_that_are_done_are_not_read_again(tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "m")
    damage(checkpoint.folder, "a.safetensors")
    os.unlink(checkpoint.folder / "b.safetensors")
    done = {"a.safetensors", "b.safetensors"}
    assert [entry.file[0] for entry in check_shards(checkpoint, 2, done)] == ["d", "c"]
    assert list(check_shards(checkpoint, 2, checkpoint.shards)) == []


def test_changed_shards_are_told_by_their_bytes(tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "m")
    known = list(check_shards(checkpoint, 1))
    assert changed_shards(checkpoint, known) == []

    def rewrite(file: str, data: bytes, ns: int) -> None:
        (checkpoint.folder / file).write_bytes(data)
        os.utime(checkpoint.folder / file, ns=(ns, ns))

    data = {entry.file: (checkpoint.folder / entry.file).read_bytes() for entry in known}
    other = {file: content[:-1] + b"\x01" for file, content in data.items()}
    # The same bytes at another time, by one nanosecond; the same time, but longer; other bytes at
    # another time; other bytes that claim to be the old ones, which are believed.
    d, a, c, b = known
    rewrite(d.file, data[d.file], d.mtime_ns + 1)
    rewrite(a.file, data[a.file] + b"\x01", a.mtime_ns)
    rewrite(c.file, other[c.file], c.mtime_ns + 10**9)
    rewrite(b.file, other[b.file], b.mtime_ns)
    assert changed_shards(checkpoint, known) == [a.file, c.file]


def test_a_shard_that_is_gone_has_changed(tmp_path: Path) -> None:
    # As after the same tensors were saved in shards of another size.
    checkpoint = sharded(tmp_path / "m")
    known = list(check_shards(checkpoint, 1))
    os.unlink(checkpoint.folder / "a.safetensors")
    assert changed_shards(checkpoint, known) == ["a.safetensors"]


def test_a_source_that_vanishes_is_one_line(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "m", {"a": numbers("F32", 8)})
    path = re.escape(str(tmp_path / "m" / SHARD))
    os.truncate(tmp_path / "m" / SHARD, (tmp_path / "m" / SHARD).stat().st_size - 1)
    with pytest.raises(ErnieQuantError, match=rf"^cannot read {path}: the file ends at byte .*\Z"):
        check_shard(checkpoint, SHARD)
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ErnieQuantError, match=rf"^cannot read {path}: No such file or dir.*\Z"):
        list(check_shards(checkpoint, 1))
