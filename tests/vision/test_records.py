"""Records with images become tokens in the right places; what cannot be read is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Ernie4_5_VLMoeConfig

from erniequant.data.image_records import ImageTextReader, has_images
from erniequant.data.images import ImageReader
from erniequant.data.records import read_records
from erniequant.data.tokenizers import load_tokenizer
from erniequant.errors import ErnieQuantError
from erniequant.models.images import ImageSettings
from erniequant.models.registry import image_settings
from tests.foreign import POINTER
from tests.micro_vl import write_image

START, IMAGE, END = 97, 96, 98
HELLO = [ord(letter) - 30 for letter in "hello"]
EOS = 1


@pytest.fixture(scope="module")
def settings(micro_vl: Path) -> ImageSettings:
    config = Ernie4_5_VLMoeConfig.from_pretrained(micro_vl)
    found = image_settings(config)
    assert found is not None
    return found


@pytest.fixture
def reader(micro_vl: Path, settings: ImageSettings) -> ImageTextReader:
    return ImageTextReader(load_tokenizer(micro_vl), settings, ImageReader(settings, micro_vl))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # A token is 8 x 8 pixels: 4 and 6 tokens.
    write_image(tmp_path / "a.png", 16, 16, seed=1)
    write_image(tmp_path / "b.png", 24, 16, seed=2)
    return tmp_path


def image(tokens: int) -> list[int]:
    return [START, *[IMAGE] * tokens, END]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"image": "a.png", "text": "hello"}, [*image(4), *HELLO, EOS]),
        ({"images": ["b.png", "a.png"], "text": "hello"}, [*image(6), *image(4), *HELLO, EOS]),
        ({"image": "a.png", "text": "he<image>llo"}, [*HELLO[:2], *image(4), *HELLO[2:], EOS]),
        ({"images": ["a.png", "b.png"], "text": "<image>hello<image>"},
         [*image(4), *HELLO, *image(6), EOS]),
    ],
)  # fmt: skip
def test_records(reader: ImageTextReader, folder: Path, record: Any, expected: list[int]) -> None:
    found = reader.read(record, "line 1", folder)
    assert found.ids.tolist() == expected
    assert found.vision is not None
    assert found.vision.tolist() == [i in (START, IMAGE, END) for i in expected]


def chat(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "u", "content": list(content)}, {"role": "b", "content": "hi"}]}


HI = [ord(letter) - 30 for letter in "hi"]
TURN, ANSWER = [ord("u") - 30, ord(":") - 30, 2], [ord("b") - 30, ord(":") - 30, 2]
NEWLINE = 0  # the tokenizer's unknown
SEMICOLON = ord(";") - 30


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ],
)
def test_chats_go_through_the_template(
    reader: ImageTextReader, folder: Path, part: dict[str, Any]
) -> None:
    record = chat(part, {"type": "text", "text": "hello"})
    assert has_images(record)
    found = reader.read(record, "line 1", folder)
    assert found.ids.tolist() == [
        *TURN, *image(4), *HELLO, SEMICOLON, *ANSWER, *HI, SEMICOLON,
    ]  # fmt: skip


HELLO_PART = {"type": "text", "text": "hello"}
TO_B = {"role": "b", "content": "hi"}


@pytest.mark.parametrize(
    "record",
    [
        # At the marker, at a part that names no image, or before the user's first words.
        {"messages": [{"role": "u", "content": "<image>hello"}, TO_B], "image": "a.png"},
        {"messages": [{"role": "u", "content": [{"type": "image"}, HELLO_PART]}, TO_B],
         "images": ["a.png"]},
        {"messages": [{"role": "u", "content": "hello"}, TO_B], "images": ["a.png"]},
        {"messages": [{"role": "u", "content": [HELLO_PART]}, TO_B], "image": "a.png"},
        {"conversations": [{"from": "u", "value": "<image>hello"}, {"from": "b", "value": "hi"}],
         "image": ["a.png"]},
        {"messages": [{"role": "u", "content": [
            {"type": "input_image", "image_url": "a.png", "text": None},
            {"type": "input_text", "text": "hello"}]}, TO_B], "text": None, "images": None},
    ],
)  # fmt: skip
def test_images_beside_a_chat(
    reader: ImageTextReader, folder: Path, record: dict[str, Any]
) -> None:
    assert has_images(record)
    found = reader.read(record, "line 1", folder)
    assert found.ids.tolist() == [
        *TURN, *image(4), *HELLO, SEMICOLON, *ANSWER, *HI, SEMICOLON,
    ]  # fmt: skip


def test_images_come_as_paths_bytes_or_opened(reader: ImageTextReader, folder: Path) -> None:
    from PIL import Image

    data = (folder / "a.png").read_bytes()
    expected = reader.read({"image": "a.png", "text": "hello"}, "line 1", folder)
    for given in (
        folder / "a.png", data, {"bytes": data, "path": None}, {"bytes": None, "path": "a.png"},
        Image.open(folder / "a.png"),
    ):  # fmt: skip
        found = reader.read({"image": given, "text": "hello"}, "line 1", folder)
        assert found.ids.tolist() == expected.ids.tolist()
        assert torch.equal(found.images[0].patches, expected.images[0].patches)


def test_columns_with_images(reader: ImageTextReader, folder: Path) -> None:
    record = {"instruction": "hello", "output": "hi", "images": ["a.png"]}
    found = reader.read(record, "line 1", folder).ids.tolist()
    user = [*(ord(letter) - 30 for letter in "user"), *TURN[1:]]
    assistant = [*(ord(letter) - 30 for letter in "assistant"), *TURN[1:]]
    assert found == [*user, *image(4), *HELLO, SEMICOLON, *assistant, *HI, SEMICOLON]


def test_chats_without_a_template_are_joined(
    reader: ImageTextReader, folder: Path, settings: ImageSettings
) -> None:
    plain = ImageTextReader(reader.tokenizer, settings, reader.image_reader, chat_template="none")
    record = chat({"type": "text", "text": "hello"}, {"type": "image", "image": "a.png"})
    found = plain.read(record, "line 1", folder)
    assert found.ids.tolist() == [*HELLO, *image(4), NEWLINE, *HI, EOS]


def test_a_prompt_is_a_turn_that_waits_for_an_answer(reader: ImageTextReader, folder: Path) -> None:
    found = reader.prompt("hello", [str(folder / "b.png")])
    answer = [ord(letter) - 30 for letter in "bot"]
    user = [ord(letter) - 30 for letter in "user"]
    colon = [ord(":") - 30, 2]
    assert found.ids.tolist() == [
        *user, *colon, *image(6), *HELLO, SEMICOLON, *answer, *colon,
    ]  # fmt: skip


def test_images_shrink_to_half_the_length_and_text_is_cut(
    reader: ImageTextReader, settings: ImageSettings, folder: Path
) -> None:
    write_image(folder / "large.png", 200, 100)
    short = ImageTextReader(reader.tokenizer, settings, reader.image_reader, length=32)
    found = short.read({"image": "large.png", "text": "x" * 100}, "line 1", folder)
    assert len(found) == 32
    assert found.placeholder is not None and 8 <= int(found.placeholder.sum()) <= 16
    (image,) = found.images
    # Twice as wide as high, as it was.
    assert image.grid[2] / image.grid[1] == pytest.approx(2, rel=0.3)
    both = short.read({"images": ["large.png"] * 2, "text": "x" * 9}, "line 1", folder)
    assert all(image.tokens(2) <= 8 for image in both.images)


def test_pixels_are_those_of_transformers_own_processor(
    reader: ImageTextReader, settings: ImageSettings, folder: Path
) -> None:
    from PIL import Image
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    (image,) = reader.read({"image": "b.png", "text": "x"}, "line 1", folder).images
    assert image.grid == (1, 4, 6)
    pixels = torch.tensor(list(Image.open(folder / "b.png").getdata())).view(16, 24, 3) / 255
    pixels = (pixels - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    # The second token of the second row of tokens, its lower left patch: all channels of it.
    patch = pixels[12:16, 8:12].permute(2, 0, 1).reshape(-1)
    row = (1 * 3 + 1) * 4 + 2
    torch.testing.assert_close(image.patches[row], patch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "none.png", "text": "x"}, "line 1: there is no image .*none.png"),
        ({"image": "broken.png", "text": "x"}, "line 1: cannot read the image .*broken.png"),
        ({"image": "a.png"}, 'has images but no "text"'),
        ({"image": 3, "text": "x"}, "an image that is not a path"),
        ({"image": "https://example.org/a.png", "text": "x"}, "give files on this machine"),
        ({"image": "a.png", "text": "<image>x<image>"}, "1 images, but <image> 2 times"),
        ({"image": "thin.png", "text": "x"}, "cannot read the image .*thin.png.*aspect ratio"),
        (chat({"type": "video", "video": "a.mp4"}), "a part of type 'video'"),
        ({"messages": [{"role": "u", "content": "<image><image>"}], "image": "a.png"},
         "1 images, but <image> 2 times in its messages"),
        ({"messages": [{"role": "u", "content": [{"type": "image"}]}]}, "an image that is not"),
        ({"image": {"bytes": b"no image"}, "text": "x"}, "line 1: cannot read its image"),
        ({"images": "a.png", "text": "x"}, "images that are not a list"),
        ({"messages": "hello"}, "messages that are not a list of objects"),
        ({"messages": [{"content": "x"}]}, "a message without role"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(
    reader: ImageTextReader, folder: Path, record: Any, message: str
) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    write_image(folder / "thin.png", 900, 2)
    with pytest.raises(ErnieQuantError, match=message) as error:
        reader.read(record, "line 1", folder)
    assert "\n" not in str(error.value)


def test_a_template_that_drops_images_is_noticed(
    reader: ImageTextReader, folder: Path, settings: ImageSettings
) -> None:
    reader.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ErnieQuantError, match="writes 0 image tokens for 1 images"):
        reader.read(chat({"type": "image", "image": "a.png"}), "line 1", folder)


def test_which_records_have_images(folder: Path) -> None:
    without = [{"text": "x"}, {"images": [], "text": "x"}, 5, chat({"type": "text", "text": "x"})]
    records = [
        {"image": "a.png", "text": "x"}, chat({"type": "image", "image": "a.png"}), *without
    ]  # fmt: skip
    path = folder / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert [has_images(r) for r, _ in read_records(path)] == [True, True, *[False] * 4]
    path.write_text('{"text": "x"}\n{"text": ')
    with pytest.raises(ErnieQuantError, match="line 2 is not JSON"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("files", "largest"),
    [
        ({}, 28 * 28 * 6177),
        ({"preprocessor_config.json": {"max_pixels": 4000}}, 4000),
        ({"preprocessor_config.json": {"size": {"longest_edge": 5000}}}, 5000),
        ({"processor_config.json": {"image_processor": {"size": {"longest_edge": 6000}}}}, 6000),
    ],
)
def test_settings_of_the_processor(
    settings: ImageSettings, tmp_path: Path, files: dict[str, Any], largest: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    image = ImageReader(settings, tmp_path).read(write_image(tmp_path / "a.png", 640, 640))
    pixels = image.grid[1] * image.grid[2] * settings.patch**2
    assert pixels <= min(largest, 640 * 640)
    assert pixels >= 0.7 * min(largest, 640 * 640)


def test_a_file_without_settings_is_refused(settings: ImageSettings, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": 3}')
    with pytest.raises(ErnieQuantError, match="no settings of an image processor"):
        ImageReader(settings, tmp_path)


def test_a_pointer_in_place_of_an_image_is_named(settings: ImageSettings, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(POINTER)
    with pytest.raises(ErnieQuantError, match=r"a\.png is a Git LFS pointer.*git lfs pull"):
        ImageReader(settings, tmp_path).read(tmp_path / "a.png")


def test_images_turn_upright_and_lose_their_alpha(settings: ImageSettings, tmp_path: Path) -> None:
    from PIL import Image

    wide = Image.open(write_image(tmp_path / "a.png", 32, 16)).convert("RGBA")
    exif = wide.getexif()
    exif[0x0112] = 6  # a camera held upright
    wide.save(tmp_path / "turned.png", exif=exif)
    reader = ImageReader(settings, tmp_path)
    # Enlarged to the least number of pixels.
    assert reader.read(tmp_path / "turned.png").grid == (1, 20, 10)
    assert reader.read(wide.convert("L")).grid == (1, 10, 20)
