"""Fetch public-domain photographs from a package registry and write the shipped copies.

    python calib_data/build/fetch_images.py [--cache DIR]

Writes the photographs in `erniequant_data/images/calibration`, their records and their part of
MANIFEST.json. All come from the source archive of scikit-image, whose `data/_fetchers.py` states
the licence of each; only those that it says are CC0 or in the public domain are taken, and the
build stops if the quoted words are no longer there. The captions were written for this repository.
"""

from __future__ import annotations

import argparse
import ast
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from fetch_texts import DATA, DEFAULT_CACHE, fetch_sdist
from PIL import Image
from records import entry, replace_entries, replace_records

PROJECT, VERSION = "scikit-image", "0.26.0"
ARCHIVE = f"scikit_image-{VERSION}"
FOLDER = f"{ARCHIVE}/src/skimage/data"
LARGEST, QUALITY = 448, 85


@dataclass(frozen=True)
class Photograph:
    """`licence` is quoted from the docstring of `function` in the package."""

    file: str
    function: str
    author: str
    licence: str
    caption: str


PHOTOGRAPHS = (
    Photograph(
        "astronaut.png", "astronaut", "NASA",
        "No known copyright restrictions, released into the public domain.",
        "A smiling astronaut in an orange space suit sits beside an American flag, a white helmet "
        "in front of her. Behind her stands a model of a space shuttle.",
    ),
    Photograph(
        "camera.png", "camera", "Lav Varshney",
        "No copyright restrictions. CC0 by the photographer (Lav Varshney).",
        "一张黑白照片：一个穿黑色大衣的男人弯着腰，看着三脚架上的摄影机。"
        "他站在草地上，远处有几座楼房。",
    ),
    Photograph(
        "chelsea.png", "chelsea", "Stefan van der Walt",
        "No copyright restrictions. CC0 by the photographer (Stefan van der Walt).",
        "The face of a tabby cat with yellow-green eyes and a pink nose, seen from near.",
    ),
    Photograph(
        "coffee.png", "coffee", "Rachel Michetti",
        "No copyright restrictions. CC0 by the photographer (Rachel Michetti).",
        "一只红色的咖啡杯放在红色的碟子上，旁边有一把小勺。杯里有咖啡，桌子是木头的。",
    ),
    Photograph(
        "rocket.jpg", "rocket", "SpaceX",
        "The image was captured by SpaceX and `released in the public domain",
        "A white rocket stands upright on its launch pad under a dark blue evening sky. Bright "
        "lamps shine around it, and tall towers rise on both sides.",
    ),
    Photograph(
        "hubble_deep_field.jpg", "hubble_deep_field", "NASA",
        "The image was captured by NASA and `may be freely used in the public domain",
        "黑色的夜空中有许多远方的星系，大大小小，有白的、蓝的、红的和黄的。",
    ),
    Photograph(
        "retina.jpg", "retina", "Mikael Häggström",
        "This file is made available under the Creative Commons CC0 1.0 Universal "
        "Public Domain Dedication.",
        "The inside of a human eye: an orange disc on black, with dark red vessels that spread "
        "from a bright yellow spot on the left.",
    ),
    Photograph(
        "clock_motion.png", "clock", "Stefan van der Walt",
        "Released into the public domain by the photographer (Stefan van der Walt).",
        "一张模糊的黑白照片，中间是墙上的一个圆钟，因为照相机在动，看不清上面的字。",
    ),
    Photograph(
        "brick.png", "brick", "CC0Textures",
        "licensed under the Creative Commons CC0 License.",
        "Grey bricks in long upright rows, with light joints of mortar between them.",
    ),
    Photograph(
        "grass.png", "grass", "linolafett",
        "and licensed under the Creative Commons CC0 License.",
        "从上面看到的一片草地，草里有一些小叶子。这是一张黑白照片。",
    ),
    Photograph(
        "gravel.png", "gravel", "CC0Textures",
        "licensed under the Creative Commons CC0 License.",
        "A black and white picture of the ground, wholly covered with small sharp stones.",
    ),
    Photograph(
        "cell.png", "cell", "Paul Müller and others",
        "This image is CC0, dedicated to the public domain.",
        "显微镜下的一个细胞：灰色的背景上，右边有一个明亮的圆点，四周是一圈黑色。",
    ),
    Photograph(
        "text.png", "text", "unknown, from Wikipedia",
        "No known copyright restrictions, released into the public domain.",
        "Formulas written by hand in black ink on squared paper, seen from one side.",
    ),
    Photograph(
        "horse.png", "horse", "Andreas Preuss",
        "No copyright restrictions. CC0 given by owner (Andreas Preuss (marauder)).",
        "白色背景上有一匹黑色的马的侧影，头朝右边。",
    ),
)  # fmt: skip


def docstrings(source: str) -> dict[str, str]:
    """Docstring of every function of a module, its white space made single."""
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return {f.name: " ".join((ast.get_docstring(f) or "").split()) for f in functions}


def shrunk(data: bytes) -> Image.Image:
    """RGB on white, at most `LARGEST` pixels wide and high."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    cache: Path = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"{ARCHIVE}.tar.gz"
    if not archive.exists():
        fetch_sdist(PROJECT, VERSION, cache)
    folder = DATA / "images" / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jpg"):
        old.unlink()
    entries, records = [], []
    with tarfile.open(archive) as tar:

        def member(name: str) -> bytes:
            file = tar.extractfile(f"{FOLDER}/{name}")
            assert file is not None
            return file.read()

        said = docstrings(member("_fetchers.py").decode("utf-8"))
        for photograph in PHOTOGRAPHS:
            if photograph.licence not in said[photograph.function]:
                raise ValueError(f"{photograph.file}: the package does not say what is quoted")
            path = folder / f"{Path(photograph.file).stem}.jpg"
            shrunk(member(photograph.file)).save(path, quality=QUALITY, optimize=True)
            records.append({"image": path.name, "text": photograph.caption})
            entries.append(
                entry(
                    path,
                    "calibration",
                    "photograph",
                    source=f"PyPI {PROJECT} {VERSION} (sdist), skimage/data/{photograph.file}",
                    author=photograph.author,
                    licence=f"CC0: {photograph.licence}"
                    if "CC0" in photograph.licence
                    else f"public domain: {photograph.licence}",
                )
            )
    replace_records(folder, ".jpg", records)
    replace_entries("calibration", "photograph", entries)


if __name__ == "__main__":
    main()
