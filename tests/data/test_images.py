"""The shipped images are what MANIFEST.json says, free to use, small, and described."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageChops

import erniequant_data

ROOT = Path(erniequant_data.__file__).parent
BUILD = ROOT.parent / "build"
IMAGES: list[dict[str, Any]] = erniequant_data.manifest()["images"]
RECORDS = {
    "calibration": erniequant_data.calibration_images(),
    "heldout": erniequant_data.heldout_images(),
}
CHINESE = re.compile(r"[\u3400-\u9fff]")


def records(use: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS[use].read_text("utf-8").splitlines()]


def names(record: dict[str, Any]) -> list[str]:
    return list(record["images"]) if "images" in record else [record["image"]]


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BUILD))
    return importlib.import_module("draw_images")


def test_files_are_the_recorded_ones() -> None:
    for entry in IMAGES:
        data = (ROOT / entry["file"]).read_bytes()
        assert len(data) == entry["bytes"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["file"]
        assert entry["file"].startswith(f"images/{entry['use']}/")


def test_every_shipped_image_is_listed_and_all_are_small() -> None:
    shipped = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "images").rglob("*")
        if p.is_file() and p.name != "records.jsonl"
    }
    assert shipped == {entry["file"] for entry in IMAGES}
    assert sum(p.stat().st_size for p in (ROOT / "images").rglob("*") if p.is_file()) < 1_500_000
    for entry in IMAGES:
        with Image.open(ROOT / entry["file"]) as image:
            assert image.mode == "RGB" and max(image.size) <= 448


def test_licences_are_recorded() -> None:
    for entry in IMAGES:
        assert entry["source"] and entry["author"]
        if entry["kind"] == "drawn":
            assert entry["licence"] == "Apache-2.0"
        else:
            assert re.match(r"(CC0|public domain): .*(CC0|public domain)", entry["licence"])
            assert re.match(r"PyPI \S+ \d", entry["source"]), "package and version"


@pytest.mark.parametrize("use", RECORDS)
def test_records_use_every_image_once(use: str) -> None:
    used = [name for record in records(use) for name in names(record)]
    shipped = [p.name for p in RECORDS[use].parent.iterdir() if p.suffix in (".png", ".jpg")]
    assert sorted(used) == sorted(shipped)
    kinds = [e["kind"] for e in IMAGES if e["use"] == use]
    assert kinds.count("drawn") == {"calibration": 32, "heldout": 48}[use]
    assert kinds.count("photograph") == {"calibration": 14, "heldout": 0}[use]


@pytest.mark.parametrize("use", RECORDS)
def test_captions_are_in_both_languages_all_along(use: str) -> None:
    texts = [record["text"] for record in records(use)]
    assert all(text.strip() == text != "" for text in texts)
    for half in (texts[: len(texts) // 2], texts[len(texts) // 2 :]):
        chinese = sum(bool(CHINESE.search(text)) for text in half)
        assert 0.3 < chinese / len(half) < 0.7
    assert sum("images" in record for record in records(use)) >= 3
    assert "images" in str(records(use)[: len(texts) // 2])


def test_drawn_images_and_captions_follow_from_their_seeds(drawing: ModuleType) -> None:
    captions = {
        n: r["text"] for use in RECORDS for r in records(use) for n in [f"{use}/{names(r)[0]}"]
    }
    for entry in IMAGES:
        if entry["kind"] != "drawn":
            continue
        image, caption = drawing.scene(entry["seed"], tuple(entry["size"]))
        with Image.open(ROOT / entry["file"]) as shipped:
            assert image.size == shipped.size
            assert ImageChops.difference(image, shipped).getbbox() is None, entry["file"]
        text = captions.get(entry["file"].removeprefix("images/"))
        assert text is None or caption in text


def test_seeds_are_kept_apart(drawing: ModuleType) -> None:
    seeds = {use: {e["seed"] for e in IMAGES if e["use"] == use and "seed" in e} for use in RECORDS}
    assert not seeds["calibration"] & seeds["heldout"]
    assert max(seeds["calibration"] | seeds["heldout"]) < drawing.TRAINING


def test_captions_say_what_is_there(drawing: ModuleType) -> None:
    for seed in range(200):
        plan = drawing.plan(seed)
        english, chinese = (drawing.caption(plan, language) for language in ("en", "zh"))
        for thing in plan.things:
            assert thing.english() in english.lower() and thing.chinese() in chinese
        assert plan.texture in english and plan.ground in english
        assert drawing.TEXTURES[plan.texture] in chinese and "None" not in english + chinese


def test_a_caption_fits_the_pixels(drawing: ModuleType) -> None:
    """The colour named first of two side by side is the one on the left, at any size."""
    plan = next(
        p for p in map(drawing.plan, range(500))
        if len(p.things) == 2 and not p.vertical and p.pattern == 0
        and all(t.shape == "circle" or t.shape == "square" for t in p.things)
    )  # fmt: skip
    assert "to the left of" in drawing.caption(plan, "en")
    image = drawing.draw(plan, 96, 64)
    for thing in plan.things:
        pixel = image.getpixel((round(thing.x * 96), round(thing.y * 64)))
        assert pixel == drawing.COLOURS[thing.colour][1]
    assert plan.things[0].x < 0.5 < plan.things[1].x
