"""The records beside the shipped images and the images' part of MANIFEST.json.

Drawn images (PNG) and photographs (JPEG) come from two scripts; each replaces its own part.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fetch_texts import DATA


def entry(path: Path, use: str, kind: str, **facts: object) -> dict[str, Any]:
    """Manifest entry of one shipped image."""
    data = path.read_bytes()
    return {
        "file": path.relative_to(DATA).as_posix(),
        "use": use,
        "kind": kind,
        **facts,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def replace_entries(use: str, kind: str, entries: list[dict[str, Any]]) -> None:
    """Replace the manifest's entries of this use and kind by `entries`."""
    path = DATA / "MANIFEST.json"
    manifest = json.loads(path.read_text("utf-8"))
    kept = [e for e in manifest.get("images", []) if (e["use"], e["kind"]) != (use, kind)]
    manifest["images"] = sorted([*kept, *entries], key=lambda e: str(e["file"]))
    path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")


def replace_records(folder: Path, suffix: str, records: list[dict[str, Any]]) -> None:
    """Replace the records whose images have this suffix by `records`; both kinds take turns."""
    path = folder / "records.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    kept = [r for r in map(json.loads, lines) if not names(r)[0].endswith(suffix)]
    ordered = taking_turns(kept, records)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in ordered)
    path.write_text(text, "utf-8")


def taking_turns(*parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All parts in one list, each spread evenly over it, so that any beginning of it has some of
    each."""
    placed = [
        ((position + 0.5) / len(part), names(record), record)
        for part in parts
        for position, record in enumerate(part)
    ]
    return [record for _, _, record in sorted(placed, key=lambda p: p[:2])]


def names(record: dict[str, Any]) -> list[str]:
    """File names of the record's images, in order."""
    return list(record["images"]) if "images" in record else [record["image"]]
