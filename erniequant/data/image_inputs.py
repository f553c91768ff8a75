"""Inputs with images for a model that is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erniequant.data.image_records import ImageTextReader
from erniequant.data.images import ImageReader
from erniequant.data.inputs import ModelInput
from erniequant.errors import ErnieQuantError
from erniequant.models.registry import image_settings
from erniequant.paths import expanded


def reader_for(
    model: Any, tokenizer: Any, *, chat_template: str = "apply", length: int | None = None
) -> ImageTextReader:
    """A reader of records for a model of `erniequant.load`, with its folder's image settings.

    Raises:
        ErnieQuantError: the model takes no images.
    """
    settings = image_settings(model.config)
    if settings is None:
        raise ErnieQuantError("the model is text-only; images need a vision-language model")
    image_reader = ImageReader(settings, Path(str(getattr(model, "name_or_path", "") or ".")))
    return ImageTextReader(tokenizer, settings, image_reader, chat_template, length)


def image_inputs(
    model: Any,
    tokenizer: Any,
    text: str,
    images: Sequence[str | Path],
    *,
    chat_template: str = "apply",
) -> ModelInput:
    """A prompt with images; ``**image_inputs(...).batch()`` is what the model takes.

    Args:
        text: comes after the images.
        chat_template: "apply" makes it a user's turn if the tokenizer has a template, "none" never.

    Raises:
        ErnieQuantError: the model takes no images, or one cannot be read.
    """
    reader = reader_for(model, tokenizer, chat_template=chat_template)
    paths = [str(expanded(image).resolve()) for image in images]
    return reader.prompt(text, paths)
