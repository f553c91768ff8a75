"""The shipped texts are what MANIFEST.json says, free to use, partly Chinese, and kept apart."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import erniequant_data

ROOT = Path(erniequant_data.__file__).parent
TEXTS: list[dict[str, Any]] = erniequant_data.manifest()["texts"]
CHINESE = re.compile(r"[\u3400-\u9fff]")


def read(folder: str) -> str:
    return "\n".join(p.read_text("utf-8") for p in sorted((ROOT / folder).glob("*.txt")))


def runs(text: str, length: int) -> set[str]:
    """Every run of `length` characters, white space left out so that line breaks do not matter."""
    solid = "".join(text.split())
    return {solid[i : i + length] for i in range(len(solid) - length + 1)}


@pytest.mark.parametrize("entry", TEXTS, ids=lambda e: str(e["file"]))
def test_file_is_the_recorded_one(entry: dict[str, Any]) -> None:
    data = (ROOT / entry["file"]).read_bytes()
    assert len(data) == entry["bytes"]
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("entry", TEXTS, ids=lambda e: str(e["file"]))
def test_origin_is_recorded(entry: dict[str, Any]) -> None:
    assert entry["titles"] and entry["authors"] and entry["kind"] and entry["year"]
    assert entry["licence"].startswith("public domain: ")
    assert re.match(r"(npm|PyPI|Debian) \S+ \d", entry["source"]), "package and version"
    assert entry["language"] == ("zh" if CHINESE.search(read_head(entry)) else "en")


def read_head(entry: dict[str, Any]) -> str:
    return (ROOT / entry["file"]).read_text("utf-8")[:1000]


def test_every_shipped_text_is_listed() -> None:
    shipped = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("*/*.txt")}
    assert shipped == {entry["file"] for entry in TEXTS}


def test_no_licence_header_or_web_mark_is_left() -> None:
    marks = r"Gutenberg|[Cc]opyright|eBook|https?:|www\.|小说网|网友|下载"
    found = re.findall(marks, read("calibration") + read("heldout"))
    assert found == []


def test_a_third_of_the_calibration_tokens_is_chinese() -> None:
    tokenizer = AutoTokenizer.from_pretrained(erniequant_data.tiny_model_dir())
    lines = erniequant_data.calibration_text().split("\n")
    counts = [len(ids) for ids in tokenizer(lines, verbose=False)["input_ids"]]
    chinese = sum(n for n, line in zip(counts, lines, strict=True) if CHINESE.search(line))
    assert 1 / 3 <= chinese / sum(counts) < 2 / 3


@pytest.mark.parametrize("folder", ["calibration", "heldout"])
def test_sources_take_turns(folder: str) -> None:
    """A quantiser that reads only part of the text must still see every kind of it."""
    text = getattr(erniequant_data, f"{folder}_text")()
    half = len(text) // 2
    shares = [len(CHINESE.findall(part)) for part in (text[:half], text[half:])]
    assert min(shares) > 0.5 * max(shares) > 0
    firsts = [p.read_text("utf-8").split("\n")[0] for p in (ROOT / folder).glob("*.txt")]
    assert all(first in text[: 2 * len(text) // 3] for first in firsts)


def test_texts_are_whole_and_of_useful_size() -> None:
    for folder, low, high in (("calibration", 300_000, 600_000), ("heldout", 150_000, 250_000)):
        mixed = getattr(erniequant_data, f"{folder}_text")()
        assert low < len(mixed.encode()) < high
        assert sorted("".join(mixed.split())) == sorted("".join(read(folder).split()))


def test_heldout_and_calibration_share_no_long_line() -> None:
    lines = [
        {line for line in read(folder).split("\n") if len(line) >= 50}
        for folder in ("calibration", "heldout")
    ]
    assert all(lines) and not lines[0] & lines[1]


def test_heldout_and_calibration_share_no_long_run() -> None:
    """Quotations and the same poem in two collections count too: 60 characters, 14 of Chinese."""
    calibration, heldout = read("calibration"), read("heldout")
    assert not runs(calibration, 60) & runs(heldout, 60)
    common = runs(calibration, 14) & runs(heldout, 14)
    assert [run for run in common if len(CHINESE.findall(run)) > 10] == []


def test_texts_can_be_had_by_language() -> None:
    whole, english, chinese = (
        erniequant_data.calibration_text(which) for which in (None, "en", "zh")
    )
    assert "Emma" in english and not CHINESE.search(english)
    assert "Emma" not in chinese and CHINESE.search(chinese)
    assert abs(len(english) + len(chinese) - len(whole)) < 10
