"""Images for vision-language models in vLLM, read as erniequant reads them for transformers.

vLLM's own processor for the family runs Baidu's code from the checkpoint. This one needs neither
that nor torchvision, and no tokenizer: one image token in the prompt stands for each image.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from erniequant.data.images import ImageReader
from erniequant.errors import ErnieQuantError
from erniequant.models.ernie45_vl import Ernie45Vl
from erniequant.models.images import ImageSettings
from erniequant.serving.checkpoints import small_files

_MAX_RATIO = 200
"""Of sides; transformers' processor refuses longer images."""


class ImageInfo(BaseProcessingInfo):
    """Facts about a model's images, and its reader."""

    @cached_property
    def settings(self) -> ImageSettings:
        """Token ids and sizes."""
        found = Ernie45Vl.image_settings(self.get_hf_config())
        assert found is not None
        return found

    @cached_property
    def reader(self) -> ImageReader:
        """Reads with the checkpoint's own settings, which are fetched for a Hugging Face id.

        Raises:
            ErnieQuantError: they cannot be read.
        """
        model = self.ctx.model_config
        return ImageReader(self.settings, small_files(model.model, model.revision))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images, no videos."""
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """None: the checkpoint says how large images may be."""
        return {}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Tokens of the largest image."""
        width, height = self.largest
        return {"image": width * height}

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Tokens in a row and in a column of an image that has as many as any."""
        return fullest(self.reader.most_tokens)


class DummyImages(BaseDummyInputsBuilder[ImageInfo]):
    """Inputs by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Nothing: `ImageProcessor.get_dummy_inputs` gives tokens."""
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        """The largest images that there can be."""
        side = self.info.settings.patch * self.info.settings.merge
        width, height = self.info.largest
        images = self._get_dummy_images(
            width=side * width, height=side * height, num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )  # fmt: skip
        return {"image": images}


class ImageProcessor(BaseMultiModalProcessor[ImageInfo]):
    """Images to patches, and image tokens of a prompt to as many as each image takes."""

    requires_tokenizer = False

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> ProcessorInputs:
        """The largest images, each between its two tokens."""
        settings = self.info.settings
        one = [settings.start_token, settings.token, settings.end_token]
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        items = self.info.parse_mm_data(data, validate=False)
        return ProcessorInputs(prompt=one * mm_counts.get("image", 0), mm_data_items=items)

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """``pixel_values`` float32 ``[P, C * p * p]`` and ``image_grid_thw`` int64 ``[n, 3]``.

        Raises:
            ValueError: which a server answers with the text: an image cannot be read, or options
                are given.
        """
        options = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        if options:
            raise ValueError(f"mm_processor_kwargs has {', '.join(options)}; give no options")
        try:
            read = [self.info.reader.read(pillow_image(image)) for image in hf_data["images"]]
        except ErnieQuantError as error:
            raise ValueError(str(error)) from error
        return BatchFeature(
            {
                "pixel_values": torch.cat([image.patches for image in read]),
                "image_grid_thw": torch.tensor([image.grid for image in read]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        grid = hf_inputs.get("image_grid_thw", torch.empty((0, 3)))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grid.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        settings = self.info.settings

        def tokens(index: int) -> list[int]:
            grid = out_mm_kwargs["image"][index]["image_grid_thw"].data
            return [settings.token] * (int(grid.prod()) // settings.merge**2)

        return [PromptReplacement(modality="image", target=[settings.token], replacement=tokens)]


def pillow_image(image: Any) -> Image.Image:
    """An image in a form that the reader takes: pillow's, or an array ``[height, width, 3]`` of
    bytes.

    Raises:
        ErnieQuantError: another form.
    """
    if isinstance(image, Image.Image):
        # The reader closes what it is given.
        return image.copy()
    array = np.asarray(image)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3:
        return Image.fromarray(array)
    raise ErnieQuantError(
        f"an image is an array of {array.dtype} {list(array.shape)}; give one of pillow, or bytes "
        "[height, width, 3]"
    )


def fullest(tokens: int) -> tuple[int, int]:
    """Sides of the fullest rectangle of at most ``tokens`` squares, the one nearest to a square of
    those that are equally full."""
    sides = range(math.isqrt(tokens), 0, -1)
    pairs = [(tokens // side, side) for side in sides if tokens // side <= _MAX_RATIO * side]
    return max(pairs, key=lambda pair: pair[0] * pair[1])
