"""Images for vLLM without an engine: sizes of the largest, forms that are taken."""

import numpy as np
import pytest
from PIL import Image

from erniequant.data.images import ImageReader
from erniequant.errors import ErnieQuantError
from erniequant.models.images import ImageSettings
from erniequant.serving.vllm.vision_processor import fullest, pillow_image
from erniequant_data import tiny_vl_model_dir


@pytest.mark.parametrize("tokens", [1, 2, 7, 48, 211, 401, 997, 6177, 40_009])
def test_no_image_has_more_tokens_than_the_largest(tokens: int) -> None:
    wide, high = fullest(tokens)
    best = max(
        side * (tokens // side) for side in range(1, tokens + 1)
        if side <= 200 * (tokens // side) and tokens // side <= 200 * side
    )  # fmt: skip
    assert wide * high == best
    assert high <= wide <= 200 * high


def test_the_reader_makes_an_image_of_as_many_tokens_as_any() -> None:
    # The settings of the tiny model: 12288 pixels in squares of 16.
    settings = ImageSettings(4353, 4352, 4354, patch=8, merge=2, channels=3)
    reader = ImageReader(settings, tiny_vl_model_dir())
    assert reader.most_tokens == 48
    wide, high = fullest(48)
    largest = reader.read(Image.new("RGB", (16 * wide, 16 * high)))
    assert largest.tokens(settings.merge) == 48
    for size in ((300, 300), (1000, 90), (77, 501)):
        assert reader.read(Image.new("RGB", size)).tokens(settings.merge) <= 48


def test_arrays_of_bytes_are_images() -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    assert (np.asarray(pillow_image(pixels)) == pixels).all()
    assert (np.asarray(pillow_image(Image.fromarray(pixels))) == pixels).all()


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5), (4, 5, 4)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ErnieQuantError, match=r"array of uint8 \["):
        pillow_image(np.zeros(shape, np.uint8))
    with pytest.raises(ErnieQuantError, match="array of float32"):
        pillow_image(np.zeros((4, 5, 3), np.float32))
