"""Inputs from batches: what contradicts itself is refused by name, and padding leaves no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from erniequant.data.inputs import ModelInput, from_batch, hash_inputs
from erniequant.data.token_hash import hash_token_ids
from erniequant.errors import ErnieQuantError
from erniequant.models.images import ImageSettings

IMAGES = ImageSettings(start_token=97, token=96, end_token=98, patch=2, merge=2, channels=3)
WIDTH = 3 * 2 * 2


def batch() -> dict[str, Any]:
    """Two rows, padded on the right and on the left; the first has two images, the second one."""
    first = [5, 97, *[96] * 2, 98, 6, 97, 96, 98, 7, 0, 0]
    second = [0, 0, 0, 97, *[96] * 3, 98, 8, 9, 10, 11]
    ids = torch.tensor([first, second])
    marked = (ids >= 96) & (ids <= 98)
    grid = torch.tensor([[1, 2, 4], [1, 2, 2], [1, 6, 2]])
    rows = int(grid.prod(-1).sum())
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 10 + [0] * 2, [0] * 3 + [1] * 9]),
        "pixel_values": torch.arange(rows * WIDTH).view(rows, WIDTH).float(),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == 96).int(),
        "moe_mm_token_type_ids": marked.int(),
    }


def test_a_padded_batch_is_taken_apart() -> None:
    first, second = from_batch(batch(), IMAGES, "batch 0")
    assert first.ids.tolist() == [5, 97, 96, 96, 98, 6, 97, 96, 98, 7]
    assert second.ids.tolist() == [97, 96, 96, 96, 98, 8, 9, 10, 11]
    assert [len(entry.images) for entry in (first, second)] == [2, 1]
    # Patches go to the images in order: 8, 4, then 12 rows.
    assert first.images[1].patches[:, 0].tolist() == [WIDTH * i for i in range(8, 12)]
    assert second.images[0].patches[:, 0].tolist() == [WIDTH * i for i in range(12, 24)]
    assert second.vision.tolist() == [True] * 5 + [False] * 4
    assert second.placeholder.tolist() == [False] + [True] * 3 + [False] * 5
    # One row of tokens three rows high and one wide: text goes on behind the three.
    assert second.positions.tolist() == [
        [0, 1, 1, 1, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 1, 1, 4, 5, 6, 7, 8],
    ]  # fmt: skip


def test_a_batch_and_back() -> None:
    for entry in from_batch(batch(), IMAGES, "batch 0"):
        again = from_batch(entry.batch(), IMAGES, "batch 1")
        assert len(again) == 1
        assert hash_inputs(again) == hash_inputs([entry])
        assert torch.equal(again[0].positions, entry.positions)


def test_text_alone() -> None:
    for images in (None, IMAGES):
        (entry,) = from_batch({"input_ids": torch.tensor([[4, 5]])}, images, "batch 0")
        assert entry.ids.tolist() == [4, 5] and entry.vision is None
    assert hash_inputs([entry]) == hash_token_ids(torch.tensor([4, 5]))
    assert set(entry.batch()) == {"input_ids", "attention_mask"}


def change(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.__setitem__(name, value)


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.__delitem__(name)


def unmark_start(given: dict[str, Any]) -> None:
    given["moe_mm_token_type_ids"] = given["mm_token_type_ids"]


def bad_number(given: dict[str, Any]) -> None:
    given["pixel_values"][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("moe_mm_token_type_ids"), "no moe_mm_token_type_ids, without which a model sends"),
        (unmark_start, "moe_mm_token_type_ids do not mark the image tokens"),
        (change("moe_mm_token_type_ids", torch.zeros(2, 12)), "moe_mm_token_type_ids has shape"),
        (drop("pixel_values"), "needs both pixel_values and image_grid_thw"),
        (drop("input_ids"), "batch 3 has no input_ids"),
        (change("image_grid_thw", torch.tensor([[1, 2, 4], [1, 2, 2]])), "pixel_values has shape"),
        (change("image_grid_thw", torch.tensor([[1, 2, 4], [1, 4, 1], [1, 6, 2]])),
         r"\[1, 4, 1\]; expected 1 and multiples of 2"),
        (change("image_grid_thw", torch.tensor([[1, 2, 2], [1, 2, 4], [1, 6, 2]])),
         r"runs of \[2, 1\] image tokens, but its 2 images have \[1, 2\]"),
        (change("pixel_values", torch.zeros(24, 5)), "pixel_values has shape"),
        (change("pixel_values_videos", torch.zeros(1)), "has a video"),
        (bad_number, "pixel_values holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_contradictions_are_named(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    given = batch()
    edit(given)
    with pytest.raises(ErnieQuantError, match=message):
        from_batch(given, IMAGES, "batch 3")


def test_an_image_too_many_or_none_at_all() -> None:
    given = batch()
    given["attention_mask"][0, 6:9] = 0
    with pytest.raises(ErnieQuantError, match="moe_mm_token_type_ids|runs of"):
        from_batch(given, IMAGES, "batch 0")
    more = batch()
    more["image_grid_thw"] = torch.cat([more["image_grid_thw"], torch.tensor([[1, 2, 2]])])
    more["pixel_values"] = torch.zeros(28, WIDTH)
    with pytest.raises(ErnieQuantError, match="has 4 images, but its text has 3"):
        from_batch(more, IMAGES, "batch 0")
    with pytest.raises(ErnieQuantError, match="the model is text-only"):
        from_batch(batch(), None, "batch 0")
    text = {"input_ids": torch.tensor([[3, 96]]), "moe_mm_token_type_ids": torch.tensor([[0, 1]])}
    with pytest.raises(ErnieQuantError, match="image tokens but no pixel_values"):
        from_batch(text, IMAGES, "batch 0")


def test_the_hash_sees_pixels_and_shape() -> None:
    entry = from_batch(batch(), IMAGES, "batch 0")[1]
    image = entry.images[0]
    moved = image.patches.clone()
    moved[11, 11] += 1
    others = [
        ModelInput(entry.ids, images=(type(image)(moved, image.grid),)),
        ModelInput(entry.ids, images=(type(image)(image.patches, (1, 2, 6)),)),
        ModelInput(entry.ids),
    ]
    assert len({hash_inputs([e]) for e in [entry, *others]}) == 4
