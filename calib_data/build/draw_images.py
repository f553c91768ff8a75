"""Draw scenes of coloured shapes with captions that say exactly what is in them.

    python calib_data/build/draw_images.py

Writes the drawn part of `erniequant_data/images/{calibration,heldout}` and of MANIFEST.json. A
scene is a function of its seed, at any size in pixels: training draws its own at the size the model
sees. Seeds of training, calibration and held-out images are disjoint. Everything is a polygon with
integer corners, drawn four times too large and averaged, so that the pixels come out the same
everywhere.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from fetch_texts import DATA
from PIL import Image, ImageDraw
from records import entry, replace_entries, replace_records, taking_turns

# First seeds; a shipped set takes far fewer than a million, training counts up without end.
CALIBRATION, HELDOUT, TRAINING = 1_000_000, 2_000_000, 3_000_000
# Images with a caption of their own, and pairs of images with one caption for both.
SHIPPED = {"calibration": (CALIBRATION, 26, 3), "heldout": (HELDOUT, 40, 4)}
SIZES = ((336, 336), (448, 336), (336, 448), (224, 224), (448, 280), (280, 448), (384, 320))
OVERSAMPLING = 4

SHAPES = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星",
    "cross": "十字", "ring": "圆环", "diamond": "菱形", "hexagon": "六边形",
}  # fmt: skip
COLOURS = {
    "red": ("红色", (214, 40, 40)), "orange": ("橙色", (247, 135, 20)),
    "yellow": ("黄色", (250, 214, 30)), "green": ("绿色", (40, 150, 60)),
    "blue": ("蓝色", (40, 80, 215)), "purple": ("紫色", (130, 50, 170)),
    "black": ("黑色", (20, 20, 20)), "white": ("白色", (255, 255, 255)),
}  # fmt: skip
# Two tones each, so that stripes show; none is as strong as a colour of a shape.
GROUNDS = {
    "grey": ("灰色", (150, 150, 150), (178, 178, 178)),
    "pale blue": ("浅蓝色", (176, 208, 236), (140, 180, 216)),
    "pale green": ("浅绿色", (188, 224, 190), (150, 198, 156)),
    "brown": ("棕色", (150, 112, 80), (124, 90, 62)),
}
TEXTURES = {"plain": "纯色", "striped": "条纹", "fading": "渐变"}
SIZE_WORDS = {"large": "大", "small": "小"}
# Half the width of a shape over the shorter side of the image. Three large ones fit in a row.
RADIUS = {"large": 0.15, "small": 0.085}
CORNERS = {
    (0, 0): ("in the upper left", "左上角"), (0, 1): ("at the top", "上方"),
    (0, 2): ("in the upper right", "右上角"), (1, 0): ("on the left", "左边"),
    (1, 1): ("in the middle", "中间"), (1, 2): ("on the right", "右边"),
    (2, 0): ("in the lower left", "左下角"), (2, 1): ("at the bottom", "下方"),
    (2, 2): ("in the lower right", "右下角"),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape; `x`, `y` are fractions of width and height, `radius` of the shorter side."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def english(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    def chinese(self) -> str:
        return f"一个{SIZE_WORDS[self.size]}的{COLOURS[self.colour][0]}{SHAPES[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """Things from left to right or, if `vertical`, from top to bottom; one stands in `cell`."""

    things: tuple[Thing, ...]
    vertical: bool
    cell: tuple[int, int]
    ground: str
    texture: str
    pattern: int
    language: str


def plan(seed: int) -> Scene:
    """The scene of a seed: its things, their places, and the words that describe it."""
    rng = random.Random(seed)
    count = rng.choice((1, 2, 2, 3))
    vertical = rng.random() < 0.4
    cell = (rng.randrange(3), rng.randrange(3))
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        look = (rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
        if look not in looks:
            looks.append(look)
    things = []
    for position, (colour, shape) in enumerate(looks):
        if count == 1:
            x, y = (0.2 + 0.3 * cell[1], 0.2 + 0.3 * cell[0])
        else:
            along = (position + 0.5) / count
            across = 0.5 + rng.uniform(-0.12, 0.12)
            x, y = (across, along) if vertical else (along, across)
        size = rng.choice(list(SIZE_WORDS))
        radius = RADIUS[size] * rng.uniform(0.92, 1.08)
        jitter = (rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02))
        things.append(Thing(size, colour, shape, x + jitter[0], y + jitter[1], radius))
    return Scene(
        tuple(things), vertical, cell, rng.choice(list(GROUNDS)), rng.choice(list(TEXTURES)),
        rng.randrange(4), rng.choice(("en", "zh")),
    )  # fmt: skip


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners in a square from -1 to 1, y downwards."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "diamond":
        return [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]
    if shape == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if shape == "cross":
        t = 0.33
        return [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1), (-t, 1), (-t, t),
                (-1, t), (-1, -t), (-t, -t)]  # fmt: skip
    if shape == "star":
        return [_polar(k, 10, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    corners = 6 if shape == "hexagon" else 72
    return [_polar(k, corners, 1.0) for k in range(corners)]


def _polar(k: int, of: int, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * k / of
    return radius * math.sin(angle), -radius * math.cos(angle)


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """RGB image of `width` x `height` pixels."""
    w, h = width * OVERSAMPLING, height * OVERSAMPLING
    _, first, second = GROUNDS[scene.ground]
    image = Image.new("RGB", (w, h), first)
    pen = ImageDraw.Draw(image)
    if scene.texture == "striped":
        for k in range(1, 12, 2):
            pen.rectangle((0, k * h // 12, w, (k + 1) * h // 12 - 1), fill=second)
    elif scene.texture == "fading":
        # From twice the difference on one side to twice it on the other, in steps that pack well.
        for k in range(32):
            part = k / 31 * 3 - 1
            tone = tuple(round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
            pen.rectangle((0, k * h // 32, w, (k + 1) * h // 32 - 1), fill=tone)
    for thing in scene.things:
        radius = thing.radius * min(w, h)
        fill = COLOURS[thing.colour][1]
        _polygon(image, pen, thing, radius, fill)
    return image.reduce(OVERSAMPLING)


def _polygon(
    image: Image.Image,
    pen: ImageDraw.ImageDraw,
    thing: Thing,
    radius: float,
    fill: tuple[int, int, int],
) -> None:
    cx, cy = thing.x * image.width, thing.y * image.height
    outer = [(round(cx + radius * x), round(cy + radius * y)) for x, y in outline(thing.shape)]
    if thing.shape == "ring":
        # A band that runs round and back: the background shows through the hole.
        inner = [
            (round(cx + 0.55 * radius * x), round(cy + 0.55 * radius * y))
            for x, y in outline("ring")
        ]
        outer = [*outer, outer[0], inner[0], *inner[::-1]]
    pen.polygon(outer, fill=fill)


def caption(scene: Scene, language: str | None = None) -> str:
    """One or two sentences; `language` "en" or "zh" instead of the scene's own."""
    if (language or scene.language) == "zh":
        return _chinese(scene)
    return _english(scene)


def _english(scene: Scene) -> str:
    named = [thing.english() for thing in scene.things]
    ground = f"a {scene.texture} {scene.ground} background"
    if len(named) == 1:
        where = CORNERS[scene.cell][0]
        return _sentence(
            (
                f"{named[0]} {where}, on {ground}.",
                f"there is {named[0]} {where} of {ground}.",
                f"on {ground} we see {named[0]} {where}.",
                f"the picture shows {named[0]}. It is {where}, on {ground}.",
            )[scene.pattern]
        )
    if len(named) == 2:
        a, b = named
        before, after = (
            ("above", "below") if scene.vertical else ("to the left of", "to the right of")
        )
        return _sentence(
            (
                f"{a} is {before} {b}, on {ground}.",
                f"{b} is {after} {a}. The background is {scene.texture} and {scene.ground}.",
                f"on {ground} there are two shapes: {a} and, {after} it, {b}.",
                f"the picture shows {a} {before} {b}. Behind them is {ground}.",
            )[scene.pattern]
        )
    a, b, c = named
    order = "from top to bottom" if scene.vertical else "from left to right"
    ends = ("at the top", "at the bottom") if scene.vertical else ("on the left", "on the right")
    return _sentence(
        (
            f"{order}: {a}, {b} and {c}, on {ground}.",
            f"three shapes: {a} {ends[0]}, {b} in the middle, {c} {ends[1]}, on {ground}.",
            f"{b} is between {a} {ends[0]} and {c} {ends[1]}. "
            f"The background is {scene.texture} and {scene.ground}.",
            f"on {ground} we see, {order}, {a}, {b} and {c}.",
        )[scene.pattern]
    )


def _chinese(scene: Scene) -> str:
    named = [thing.chinese() for thing in scene.things]
    tone = f"{TEXTURES[scene.texture]}的{GROUNDS[scene.ground][0]}"
    ground = f"{tone}背景"
    if len(named) == 1:
        where = CORNERS[scene.cell][1]
        return (
            f"{named[0]}在{where}，背景是{tone}。",
            f"{ground}的{where}有{named[0]}。",
            f"在{ground}上，{where}是{named[0]}。",
            f"图中有{named[0]}，在{where}，{ground}。",
        )[scene.pattern]
    if len(named) == 2:
        a, b = named
        before, after = ("上面", "下面") if scene.vertical else ("左边", "右边")
        return (
            f"{a}在{b}的{before}，背景是{tone}。",
            f"{b}在{a}的{after}，{ground}。",
            f"{ground}上有两个图形：{before}是{a}，{after}是{b}。",
            f"图中{before}是{a}，{after}是{b}，后面是{ground}。",
        )[scene.pattern]
    a, b, c = named
    order = "从上到下" if scene.vertical else "从左到右"
    ends = ("上面", "下面") if scene.vertical else ("左边", "右边")
    return (
        f"{order}是{a}、{b}和{c}，背景是{tone}。",
        f"三个图形：{ends[0]}是{a}，中间是{b}，{ends[1]}是{c}，{ground}。",
        f"{b}在中间，{ends[0]}是{a}，{ends[1]}是{c}，背景是{tone}。",
        f"在{ground}上，{order}依次有{a}、{b}和{c}。",
    )[scene.pattern]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def both(first: str, second: str, language: str) -> str:
    """One text about two images, in their order."""
    if language == "zh":
        return f"第一幅图：{first}第二幅图：{second}"
    return f"First picture: {first} Second picture: {second}"


def scene(seed: int, size: tuple[int, int] | None = None) -> tuple[Image.Image, str]:
    """Image (of `size`, width and height in pixels, or a shipped size) and its caption."""
    what = plan(seed)
    return draw(what, *(size or SIZES[seed % len(SIZES)])), caption(what)


def ship(use: str) -> None:
    """Write the images of one set, its records, and its manifest entries."""
    first, singles, pairs = SHIPPED[use]
    folder = DATA / "images" / use
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    alone, together, entries = [], [], []
    for number in range(singles + 2 * pairs):
        name, image = f"drawn_{number:03d}.png", scene(first + number)[0]
        image.save(folder / name, optimize=True)
        what = plan(first + number)
        if number < singles:
            alone.append({"image": name, "text": caption(what)})
        elif (number - singles) % 2:
            before = plan(first + number - 1)
            text = both(caption(before), caption(what, before.language), before.language)
            together.append({"images": [f"drawn_{number - 1:03d}.png", name], "text": text})
        entries.append(
            entry(
                folder / name, use, "drawn",
                source="calib_data/build/draw_images.py", author="the authors of erniequant",
                licence="Apache-2.0", seed=first + number, size=list(image.size),
            )
        )  # fmt: skip
    replace_records(folder, ".png", taking_turns(alone, together))
    replace_entries(use, "drawn", entries)


def main() -> None:
    for use in SHIPPED:
        ship(use)


if __name__ == "__main__":
    main()
