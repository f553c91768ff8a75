"""Public-domain texts, images with captions, and two embedded tiny models (ERNIE 4.5 MoE and VL).

Every text, image and figure is described in `manifest()`; `calib_data/build/` in the source
repository makes them again.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = [
    "calibration_images",
    "calibration_text",
    "heldout_images",
    "heldout_text",
    "manifest",
    "tiny_model_dir",
    "tiny_vl_model_dir",
]

# UTF-8 bytes of one source before the next takes its turn: about 4000 tokens in either language, so
# that most windows of a thousand tokens stay within one source.
PIECE = 12_000


def _root() -> Path:
    return Path(str(files(__name__)))


def tiny_model_dir() -> Path:
    """Folder of the trained bf16 model: config, tokenizer and two weight shards."""
    return _root() / "tiny_model"


def tiny_vl_model_dir() -> Path:
    """Folder of the trained bf16 vision-language model: as above, and the image processor."""
    return _root() / "tiny_vl_model"


def calibration_images() -> Path:
    """`records.jsonl` of the calibration images, which lie beside it.

    One JSON object a line: `image` (a file name) or `images` (several, in their order), and `text`,
    which describes them. Drawn scenes and photographs take turns; English and Chinese.
    """
    return _root() / "images" / "calibration" / "records.jsonl"


def heldout_images() -> Path:
    """`records.jsonl` of images that neither training nor calibration has seen; drawn scenes
    only."""
    return _root() / "images" / "heldout" / "records.jsonl"


def manifest() -> dict[str, Any]:
    """MANIFEST.json: `texts` and `images` (lists, one entry per file), `model` and `vl_model`.

    The last two hold training facts and figures.
    """
    content: dict[str, Any] = json.loads((_root() / "MANIFEST.json").read_text("utf-8"))
    return content


def calibration_text(language: str | None = None) -> str:
    """The default calibration text; its sources take turns, so any long part is a fair mixture.

    `language`: "en" or "zh" for that part alone.
    """
    return _mixture("calibration", language)


def heldout_text(language: str | None = None) -> str:
    """Text of the same kinds that neither training nor calibration has seen, mixed likewise."""
    return _mixture("heldout", language)


def _mixture(folder: str, language: str | None) -> str:
    """The files of the folder, cut at line ends, every file spread evenly over the result."""
    languages = {entry["file"]: entry["language"] for entry in manifest()["texts"]}
    placed: list[tuple[float, str, str]] = []
    for path in sorted((_root() / folder).glob("*.txt")):
        if language not in (None, languages[f"{folder}/{path.name}"]):
            continue
        pieces = _pieces(path.read_text("utf-8").rstrip("\n"))
        for position, piece in enumerate(pieces):
            placed.append(((position + 0.5) / len(pieces), path.name, piece))
    return "\n\n".join(piece for _, _, piece in sorted(placed)) + "\n"


def _pieces(text: str) -> list[str]:
    """Whole lines of at least `PIECE` bytes together; the remainder joins the last piece."""
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for line in text.split("\n"):
        current.append(line)
        size += len(line.encode()) + 1
        if size >= PIECE:
            pieces.append("\n".join(current).strip("\n"))
            current, size = [], 0
    if current:
        rest = "\n".join(current).strip("\n")
        if pieces and rest:
            pieces[-1] += "\n" + rest
        elif rest:
            pieces.append(rest)
    return pieces
