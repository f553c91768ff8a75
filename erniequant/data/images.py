"""From image files to the patches that the vision tower takes, with pillow alone.

The processor is transformers' own for these models; the one that needs torchvision is not used.
"""

from pathlib import Path
from typing import Any

from erniequant.checkpoint.pointers import refuse_pointer
from erniequant.checkpoint.reader import read_json
from erniequant.data.inputs import ImagePatches
from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.models.images import ImageSettings

# The newer file of transformers holds the settings of several processors.
_FILES = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))
_KEPT = ("image_mean", "image_std", "rescale_factor")
# Pixel limits of the released processors, for checkpoints without settings.
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 6177


class ImageReader:
    """Reads images as a checkpoint's own processor would."""

    def __init__(self, images: ImageSettings, folder: Path):
        """Raises ErnieQuantError if the processor's settings in ``folder`` cannot be read."""
        self._images = images
        self._settings = _settings(folder)
        self._processor: Any = None

    def read(self, source: Path | Any, max_tokens: int | None = None) -> ImagePatches:
        """An image from a file or from pillow, shrunk to at most ``max_tokens`` tokens.

        Raises:
            ErnieQuantError: it is not an image that pillow can read, or too long and thin.
        """
        from PIL import Image, ImageOps

        name = source if isinstance(source, Path) else "an image of the data set"
        if isinstance(source, Path) and not source.is_file():
            raise ErnieQuantError(f"there is no image {source}; check the path")
        if isinstance(source, Path):
            refuse_pointer(source)
        with wrap_errors(f"cannot read the image {name}"):
            with Image.open(source) if isinstance(source, Path) else source as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
            made = self._made_processor()(
                images=upright, size=self._pixels(max_tokens), return_tensors="pt"
            )
        patches, grid = made["pixel_values"], made["image_grid_thw"][0].tolist()
        image = ImagePatches(patches.float(), (grid[0], grid[1], grid[2]))
        if max_tokens is not None and image.tokens(self._images.merge) > max_tokens:
            raise ErnieQuantError(
                f"the image {name} is {upright.width} x {upright.height} pixels, which do not fit "
                f"{max_tokens} tokens; crop it"
            )
        return image

    @property
    def most_tokens(self) -> int:
        """Tokens that an image may have at most, by the processor's settings."""
        return self._pixels(None)["longest_edge"] // (self._images.patch * self._images.merge) ** 2

    def _made_processor(self) -> Any:
        if self._processor is None:
            from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
                Ernie4_5_VLMoeImageProcessorPil,
            )

            self._processor = Ernie4_5_VLMoeImageProcessorPil(
                patch_size=self._images.patch,
                merge_size=self._images.merge,
                **{name: self._settings[name] for name in _KEPT if name in self._settings},
            )
        return self._processor

    def _pixels(self, max_tokens: int | None) -> dict[str, int]:
        """Least and most pixels of an image, under the names that the processor gives them."""
        size = self._settings.get("size") or {}
        least = self._settings.get("min_pixels") or size.get("shortest_edge") or _MIN_PIXELS
        most = self._settings.get("max_pixels") or size.get("longest_edge") or _MAX_PIXELS
        if max_tokens is not None:
            most = min(most, max_tokens * (self._images.patch * self._images.merge) ** 2)
        return {"shortest_edge": min(least, most), "longest_edge": most}


def _settings(folder: Path) -> dict[str, Any]:
    for file, part in _FILES:
        if (folder / file).is_file():
            contents = read_json(folder / file)
            settings = contents if part is None else contents.get(part, {})
            if not isinstance(settings, dict) or not isinstance(settings.get("size", {}), dict):
                raise ErnieQuantError(f"{folder / file} has no settings of an image processor")
            return settings
    return {}
