"""The calibration data of a run: read, checked against the model, and announced."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from erniequant.calibration.batches import batched_windows
from erniequant.calibration.config import CalibrationConfig
from erniequant.calibration.documents import given_documents
from erniequant.calibration.texts import CalibrationWindows, calibration_windows, image_records
from erniequant.checkpoint.reader import Checkpoint
from erniequant.data.given import BATCHES, FILES, Given, given, kind_of_members, members
from erniequant.data.image_records import ImageTextReader, has_images
from erniequant.data.images import ImageReader
from erniequant.data.tokenizers import load_tokenizer
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import Architecture
from erniequant.progress import Progress
from erniequant.quantization.report import CalibrationReport

UNSEEN_IMAGES = (
    "vision experts are quantised for the inputs of the text experts, and count as degraded "
    "(exit code 3)"
)


@dataclass(frozen=True)
class Calibration:
    """The calibration data, as far as it is known before the plan is made.

    Attributes:
        data: Python objects, of one ``kind``; None where ``config.source`` names the data.
        windows: windows of batches, which need no tokenizer.
        images: most records or batches with images; None where only reading all would tell.
    """

    config: CalibrationConfig
    data: Given | None = None
    kind: str | None = None
    windows: CalibrationWindows | None = None
    images: int | None = 0


def prepare(
    calib: Any, config: CalibrationConfig, model: Architecture, dry_run: bool
) -> Calibration:
    """Look at the data that is given. A dry run takes nothing out of an iterator.

    Raises:
        ErnieQuantError: it cannot be calibrated on, or not with this model.
    """
    source = given(
        calib, "calib", "leave it out to calibrate on the built-in text, or give no_calib=True"
    )
    if isinstance(source, str):
        config = replace(config, source=source)
        if model.images is None:
            return Calibration(config)
        records = image_records(config)
        return Calibration(config, images=None if records is None else min(records, config.samples))
    if dry_run and source.once:
        return Calibration(replace(config, source="an iterator"), source, images=None)
    kind, data = kind_of_members(source)
    config = replace(config, source=kind)
    if kind == BATCHES:
        windows = batched_windows(data, model.images, model.sizes.vocabulary, config.samples)
        with_images = sum(bool(window.images) for window in windows.windows)
        return Calibration(config, data, kind, windows, with_images)
    if model.images is None:
        return Calibration(config, data, kind)
    if kind == FILES or not data.sized:
        return Calibration(config, data, kind, images=None)
    count = sum(has_images(record) for record, _ in members(data, kind))
    return Calibration(config, data, kind, images=min(count, config.samples))


def read_windows(
    checkpoint: Checkpoint, model: Architecture, calibration: Calibration, watch: Progress
) -> CalibrationWindows:
    """The windows to calibrate on, announced.

    Raises:
        ErnieQuantError: it cannot be read, or is not for this model.
    """
    config = calibration.config
    windows = calibration.windows or _tokenized(checkpoint, model, calibration)
    watch.message(
        f"calibrating on {windows.tokens} tokens in {len(windows.windows)} windows of "
        f"{config.source}"
        + (f"; the first document begins {windows.rendered[:80]!r}" if windows.rendered else "")
    )
    if windows.empty:
        rows = "row" if windows.empty == 1 else "rows"
        watch.message(f"skipped {windows.empty} empty {rows} of {config.source}")
    if model.images is not None:
        watch.message(
            f"{windows.images} images in it, {windows.vision_tokens} tokens for vision experts"
            if windows.images
            else f"no images in it: {UNSEEN_IMAGES}"
        )
    return windows


def _tokenized(
    checkpoint: Checkpoint, model: Architecture, calibration: Calibration
) -> CalibrationWindows:
    config = calibration.config
    tokenizer = load_tokenizer(checkpoint.folder, or_else="add its files or use --no-calib")
    texts = None
    if calibration.data is not None and calibration.kind is not None:
        texts = given_documents(calibration.data, calibration.kind, config, tokenizer)
    reader = _reader(checkpoint, model, config, tokenizer)
    windows = calibration_windows(tokenizer, config, reader, texts)
    ids = torch.cat([window.ids for window in windows.windows])
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.sizes.vocabulary:
        raise ErnieQuantError(
            f"the tokenizer of {checkpoint.folder} makes token id {int(ids.max())}, but the model "
            f"has {model.sizes.vocabulary}"
        )
    return windows


def _reader(
    checkpoint: Checkpoint, model: Architecture, config: CalibrationConfig, tokenizer: Any
) -> ImageTextReader | None:
    if model.images is None:
        return None
    image_reader = ImageReader(model.images, checkpoint.folder)
    return ImageTextReader(
        tokenizer, model.images, image_reader, config.chat_template, config.length
    )


def amounts(calibration: Calibration, model: Architecture) -> tuple[int, int, int]:
    """The most tokens, the longest window and the most image patches that there can be.

    If the number of records with images is unknown, it is taken to be that of text windows.
    """
    windows, config = calibration.windows, calibration.config
    if windows is not None:
        images = [image for window in windows.windows for image in window.images]
        longest = max(map(len, windows.windows))
        return windows.tokens, longest, sum(len(image.patches) for image in images)
    image_windows = config.samples if calibration.images is None else calibration.images
    image_windows = image_windows if model.images else 0
    of_image = config.length // 2 * (model.images.merge**2 if model.images else 0)
    return (config.samples + image_windows) * config.length, config.length, image_windows * of_image


def image_note(calibration: Calibration) -> str:
    """A line on what the vision experts will be calibrated on."""
    images, source = calibration.images, calibration.config.source
    if images is None:
        return f"vision experts are calibrated on the images of {source}, if it has any"
    if not images:
        return f"no images in {source}: {UNSEEN_IMAGES}"
    what = "sequences" if calibration.windows is not None else "records"
    return f"vision experts are calibrated on {images} {what} with images of {source}"


def calibration_report(
    config: CalibrationConfig | None, windows: CalibrationWindows | None
) -> CalibrationReport | None:
    if windows is None or config is None:
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
