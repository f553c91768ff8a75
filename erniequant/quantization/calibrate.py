"""What a run is calibrated on: read, checked against the model, and announced."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from erniequant.calibration.texts import (
    CalibrationConfig,
    CalibrationWindows,
    batched_windows,
    calibration_windows,
    image_records,
)
from erniequant.checkpoint.reader import Checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import Architecture
from erniequant.progress import Progress
from erniequant.quantization.report import CalibrationReport
from erniequant.tokenizers import load_tokenizer
from erniequant.vision.pictures import PictureReader
from erniequant.vision.records import ImageTextReader

UNSEEN_IMAGES = (
    "experts for images are quantised for what experts for text see, and count as degraded "
    "(exit code 3)"
)


def read_windows(
    checkpoint: Checkpoint,
    model: Architecture,
    calib: str | Sequence[Mapping[str, Any]],
    config: CalibrationConfig,
    watch: Progress,
) -> CalibrationWindows:
    """What to calibrate on, announced.

    Raises:
        ErnieQuantError: it cannot be read, or is not for this model.
    """
    if isinstance(calib, str):
        tokenizer = load_tokenizer(checkpoint.folder, or_else="add its files or use --no-calib")
        windows = calibration_windows(
            tokenizer, config, _reader(checkpoint, model, config, tokenizer)
        )
    else:
        windows = batched_windows(calib, model.images)
    ids = torch.cat([window.ids for window in windows.windows])
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.sizes.vocabulary:
        raise ErnieQuantError(
            f"the tokenizer of {checkpoint.folder} makes token id {int(ids.max())}, but the model "
            f"has {model.sizes.vocabulary}"
        )
    watch.message(
        f"calibrating on {windows.tokens} tokens in {len(windows.windows)} windows of "
        f"{config.source}"
        + (f"; the first document begins {windows.rendered[:80]!r}" if windows.rendered else "")
    )
    if model.images is not None:
        watch.message(
            f"{windows.images} images in it, {windows.vision_tokens} tokens for experts for images"
            if windows.images
            else f"no images in it: {UNSEEN_IMAGES}"
        )
    return windows


def _reader(
    checkpoint: Checkpoint, model: Architecture, config: CalibrationConfig, tokenizer: Any
) -> ImageTextReader | None:
    if model.images is None:
        return None
    pictures = PictureReader(model.images, checkpoint.folder)
    return ImageTextReader(tokenizer, model.images, pictures, config.chat_template, config.length)


def image_documents(
    calib: str | Sequence[Mapping[str, Any]], config: CalibrationConfig
) -> int | None:
    """Up to how many documents with images are calibrated on; None if only reading would tell.

    Raises:
        ErnieQuantError: the source cannot be read.
    """
    if not isinstance(calib, str):
        return sum(batch.get("pixel_values") is not None for batch in calib)
    found = image_records(config)
    return None if found is None else min(found, config.samples)


def amounts(
    calib: str | Sequence[Mapping[str, Any]],
    config: CalibrationConfig,
    model: Architecture,
    images: int | None,
) -> tuple[int, int, int]:
    """The most tokens, the longest window and the most patches of images that there can be.

    images: of `image_documents`; where nobody knows, as many as windows of text.
    """
    if not isinstance(calib, str):
        ids = [torch.as_tensor(batch["input_ids"]) for batch in calib if "input_ids" in batch]
        patches = sum(len(b["pixel_values"]) for b in calib if b.get("pixel_values") is not None)
        longest = max((table.shape[-1] for table in ids if table.dim()), default=2)
        return sum(table.numel() for table in ids), longest, patches
    known = config.samples if images is None else images
    of_image = config.length // 2 * (model.images.merge**2 if model.images else 0)
    return (config.samples + known) * config.length, config.length, known * of_image


def image_note(
    calib: str | Sequence[Mapping[str, Any]], config: CalibrationConfig, images: int | None
) -> str:
    """What experts for images will be calibrated on; ``images`` of `image_documents`."""
    if images is None:
        return f"experts for images are calibrated on the images of {config.source}, if it has any"
    if not images:
        return f"no images in {config.source}: {UNSEEN_IMAGES}"
    what = "records" if isinstance(calib, str) else "batches"
    return f"experts for images are calibrated on {images} {what} with images of {config.source}"


def calibration_report(
    config: CalibrationConfig, windows: CalibrationWindows | None
) -> CalibrationReport | None:
    if windows is None:
        return None
    return CalibrationReport(
        config.source,
        len(windows.windows),
        windows.tokens,
        windows.sha256,
        windows.rendered,
        windows.images,
        windows.vision_tokens,
    )
