"""Damage of safetensors files: length field, header entries, payload; and of JSONL texts."""

import json
import random
import struct
from pathlib import Path
from typing import Any

from json_damage import damage_json

DTYPES = ["BF16", "F16", "F32", "F64", "I16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "U16", "F4",
          "C64", "", "bf16", 3, None]  # fmt: skip
DIMENSIONS: list[Any] = [0, -1, 1, 2, 2**31, 2**62, 2**63, 2**64, 10**30, 1.0, True, "8", None]
# Bit patterns of bfloat16: infinities, not a number, the largest finite, a denormal, negative zero.
PATTERNS = [0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0x0001, 0x8000]


def damage_shard(path: Path, rng: random.Random) -> str:
    """Change one thing in a safetensors file; returns what."""
    raw = path.read_bytes()
    kind = rng.choices(("header", "payload", "length", "bytes"), (6, 3, 1, 1))[0]
    split = _split(raw)
    if split is None or kind == "bytes":
        return f"{path.name}: {_damage_ends(path, bytearray(raw), rng)}"
    header, data = split
    if kind == "length":
        length = rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, len(raw), rng.randrange(len(raw))])
        _put(path, struct.pack("<Q", length) + raw[8:])
        return f"{path.name}: header length {length}"
    if kind == "payload":
        return f"{path.name}: {_damage_payload(path, raw, header, data, rng)}"
    return f"{path.name}: {_damage_header(path, header, data, rng)}"[:300]


def _split(raw: bytes) -> tuple[dict[str, Any], bytes] | None:
    try:
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        found = {k: v for k, v in header.items() if k != "__metadata__"}
        assert all({"dtype", "shape", "data_offsets"} <= set(v) for v in found.values()) and found
        return header, raw[8 + length :]
    except (ValueError, struct.error, AttributeError, AssertionError, TypeError, RecursionError):
        return None


def _put(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _join(path: Path, text: str, data: bytes) -> None:
    encoded = text.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    _put(path, struct.pack("<Q", len(encoded)) + encoded + data)


def _damage_ends(path: Path, raw: bytearray, rng: random.Random) -> str:
    at = rng.randrange(len(raw)) if raw else 0
    how = rng.choice(("truncate", "append", "flip", "empty"))
    if how == "truncate":
        del raw[at:]
    elif how == "append":
        raw += bytes(rng.choice([1, 8, 1000]))
    elif how == "flip" and raw:
        at = rng.randrange(min(len(raw), 20_000))
        raw[at] ^= 1 << rng.randrange(8)
    else:
        raw.clear()
    _put(path, bytes(raw))
    return f"{how} at {at}"


def _damage_payload(
    path: Path, raw: bytes, header: dict[str, Any], data: bytes, rng: random.Random
) -> str:
    name = rng.choice([n for n in header if n != "__metadata__"])
    changed = bytearray(raw)
    start = len(raw) - len(data)
    try:
        begin, end = header[name]["data_offsets"]
        at = start + rng.randrange(begin, end)
    except (ValueError, TypeError):
        at = rng.randrange(start, max(len(raw), start + 1))
    at = min(max(at, start), max(len(raw) - 2, 0))
    if rng.random() < 0.5:
        at -= (at - start) % 2
        changed[at : at + 2] = struct.pack("<H", rng.choice(PATTERNS))
    elif changed:
        changed[at] ^= 1 << rng.randrange(8)
    _put(path, bytes(changed))
    return f"payload of {name:.60} at {at}"


def _damage_header(path: Path, header: dict[str, Any], data: bytes, rng: random.Random) -> str:
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    how = rng.choice(("offsets", "dtype", "shape", "drop", "cut out", "foreign", "rename", "swap",
                      "twice", "entry", "metadata", "text", "json"))  # fmt: skip
    text = None
    if how == "offsets":
        begin, end = (entry["data_offsets"] + [0, 0])[:2]
        other = rng.choice(names)
        entry["data_offsets"] = rng.choice([
            [end, begin], [begin, end + 2], [begin + 2, end + 2], [-2, end], [begin, 2**63],
            [2**64, 2**64], [begin, begin], [str(begin), end], [begin], [begin, end, end],
            [float(begin), float(end)], header[other]["data_offsets"], [True, end], None, {},
        ])  # fmt: skip
    elif how == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif how == "shape":
        shape = list(entry["shape"])
        entry["shape"] = rng.choice([
            [*shape, 1], shape[::-1], [], None, [1] * 100 + shape, [0, *shape], [2**63, 0],
            [2**62, 4, 0], [rng.choice(DIMENSIONS), *shape[1:]], [*shape[:-1], *shape[-1:]] * 2,
            [2**32, 2**32], [-n for n in shape], "8", [True, *shape], [float(n) for n in shape],
        ])  # fmt: skip
    elif how == "drop":
        del header[name]
    elif how == "cut out":
        data = _cut_out(header, name, data)
    elif how == "foreign":
        new = rng.choice([
            "model.extra", "x\ny", "\ud800", "", "model.layers.0.mlp.experts.gate_up_proj_packed",
            "model.layers.²", "model.mtp_" + "9" * 5000, "model.mtp_x", "n" * 100_000,
            "model.layers.1.mlp.experts.down_proj", "model.layers.99999999999.norm.weight",
            "model.layers.1.mlp.experts.77.up_proj.weight", "lm_head.weight", "../x",
        ])  # fmt: skip
        added = rng.choice([0, 4])
        header[new] = {"dtype": "F32", "shape": [added // 4],
                       "data_offsets": [len(data), len(data) + added]}  # fmt: skip
        data += bytes(added)
        name = f"{new!r:.60}"
    elif how == "rename":
        new = rng.choice([
            name + "x", name[:-1], name.replace("1", "2"), name.replace("layers.2", "layers.02"),
            name.replace("model.", ""), name.replace("proj", "proj_"), "a\nb", "model." + name,
        ])  # fmt: skip
        header = {new if n == name else n: e for n, e in header.items()}
    elif how == "swap":
        same = [n for n in names if header[n]["shape"] == entry["shape"]]
        other = rng.choice(same)
        header[name], header[other] = header[other], header[name]
    elif how == "twice":
        text = json.dumps(header)
        twin = {**entry, "shape": rng.choice([entry["shape"], [0], list(entry["shape"])[::-1]])}
        text = text[:-1] + ", " + json.dumps({name: twin})[1:-1] + "}"
    elif how == "entry":
        header[name] = rng.choice([None, 3, [], {}, "x", {**entry, "more": 1}, {"dtype": "F32"}])
    elif how == "metadata":
        header["__metadata__"] = rng.choice([None, 3, {"format": 3}, {"format": "np"}, {}, [], {
            "format": "pickle"}])  # fmt: skip
    elif how == "text":
        text = rng.choice(["", "{}", "[]", "null", " " + json.dumps(header), "{" * 100_000,
                           "[" * 50_000 + "]" * 50_000, '{"a": NaN}',
                           json.dumps(header) + "x", '{"__metadata__": {}}'])  # fmt: skip
    else:
        copy = path.with_name(".header")
        copy.write_text(json.dumps(header))
        what = damage_json(copy, rng)
        text = copy.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
        copy.unlink()
        encoded = text.encode("utf-8", "surrogateescape")
        _put(path, struct.pack("<Q", len(encoded)) + encoded + data)
        return what
    _join(path, json.dumps(header) if text is None else text, data)
    return f"header {how} {name:.60} {header.get(name)!r:.100}"


def _cut_out(header: dict[str, Any], name: str, data: bytes) -> bytes:
    """Remove a tensor whole, so that the file stays consistent."""
    try:
        begin, end = header.pop(name)["data_offsets"]
        for other, entry in header.items():
            if other != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [n - (end - begin) for n in entry["data_offsets"]]
        return data[:begin] + data[end:]
    except (ValueError, TypeError):
        return data


LINES: list[bytes] = [
    b"{oops", b"", b"   ", b"null", b"3", b"[]", b'"text"', b"{}", b'{"text": 3}',
    b'{"text": ""}', b'{"text": null, "messages": null}', b'{"messages": []}',
    b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": 1, "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": ["x"]}]}', b'{"messages": {"role": "x"}}',
    b'{"text": "\\ud800"}', b'{"messages": [{"role": "user", "content": "a\\udc00b"}]}',
    b'{"text": "\xff"}', b'{"text": "a\\u0000b"}', '{"text": "one\u2028two\x85three"}'.encode(),
    b'{"text": "a", "text": 3}', b"[" * 100_000, b'{"text": ' + b'"x' * 50_000, b'{"text": "a"} x',
    b'{"text": NaN}', b"\xef\xbb\xbf{}", b'{"content": "x"}', b"\x00", b'{"text": "ok\\nfine"}',
    b'{"text": ' + b"9" * 5000 + b"}",
]  # fmt: skip


def damage_lines(path: Path, rng: random.Random) -> str:
    """Change one line of a JSONL file, or its bytes; returns what."""
    lines = path.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    how = rng.choice(("replace", "replace", "insert", "flip", "truncate", "all"))
    line = rng.choice(LINES)
    if how == "replace":
        lines[at] = line
    elif how == "insert":
        lines.insert(at, line)
    elif how == "all":
        lines = [line] * rng.choice([1, 3])
    raw = bytearray(b"\n".join(lines))
    place = rng.randrange(len(raw)) if raw else 0
    if how == "flip" and raw:
        raw[place] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del raw[place:]
    path.write_bytes(raw)
    return f"{path.name}: {how} line {at} {line[:60]!r} or byte {place}"
