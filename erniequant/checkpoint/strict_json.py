"""JSON as damaged and hostile files make it necessary: one meaning or none, and bounded.

Python's parser takes the last of two equal keys, halves of surrogate pairs, and nesting up to where
something later overflows its stack. Others read the same file differently, so these are refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
_MAX_NAME_BYTES = 255


def parse_json(data: bytes) -> Any:
    """The value of UTF-8 JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, a key twice in one object, half of a surrogate pair, or
            nested more than `MAX_DEPTH` deep.
    """
    try:
        text = data.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    if _deeper_than(parsed, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if "\\ud" in text.lower():
        try:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair in a text") from None
    return parsed


def is_plain_file_name(name: Any) -> bool:
    """True if a value found in a file can only name something in that file's own folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not set(name) & {"/", "\\"}
        and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES
    )


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no regular file (a pipe would keep us waiting).
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return data


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twin!r} twice")
    return entries


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return any(isinstance(node, (dict, list)) for node in level)
