"""Calibration text: from the built-in collection, a file, a data set or Python objects to windows
of token ids, with images where the model takes them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from erniequant.calibration.config import SURPLUS, CalibrationConfig
from erniequant.calibration.documents import (
    Document,
    EmptyRow,
    ImageDocument,
    documents,
    source_file,
)
from erniequant.data.files import kind_of, no_text
from erniequant.data.image_records import ImageTextReader, has_images
from erniequant.data.inputs import ModelInput, hash_inputs
from erniequant.data.records import read_records
from erniequant.data.tokens import token_ids
from erniequant.errors import ErnieQuantError

SHOWN = 400
"""Characters of the first document that a report shows."""


@dataclass(frozen=True, eq=False)
class CalibrationWindows:
    """The calibration windows and where they came from.

    ``windows`` are windows of text, then documents with images. ``sha256`` is `hash_inputs` of all
    of them; ``rendered`` shows the start of the first document; ``empty`` counts the records
    without text that were passed over.
    """

    windows: tuple[ModelInput, ...]
    sha256: str
    rendered: str
    empty: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.windows))

    @property
    def vision_tokens(self) -> int:
        """Tokens that go to vision experts."""
        return sum(int(w.vision.sum()) for w in self.windows if w.vision is not None)

    @property
    def images(self) -> int:
        """Images in all windows."""
        return sum(len(window.images) for window in self.windows)


def calibration_windows(
    tokenizer: Any,
    config: CalibrationConfig,
    reader: ImageTextReader | None = None,
    given: Iterable[Document] | None = None,
) -> CalibrationWindows:
    """Tokenise the source, cut its text into windows of ``config.length``, and choose
    ``config.samples`` of them and as many documents with images.

    Documents follow one another, separated by the end-of-text token where the tokenizer has one;
    no BOS is added. A source shorter than one window yields one shorter window. A document with
    images is a window of its own.

    Args:
        reader: reads records with images; None for a text-only model.
        given: documents to use instead of the source's.

    Raises:
        ErnieQuantError: the source cannot be read, holds no text, or has images that the model
            does not take.
    """
    tables: list[torch.Tensor] = []
    tokens = empty = 0
    with_images: list[ImageDocument] = []
    rendered = ""
    end = tokenizer.eos_token_id
    if given is None:
        given = documents(config, tokenizer, images=reader is not None)
    for document in given:
        if isinstance(document, EmptyRow):
            empty += 1
        elif isinstance(document, ImageDocument):
            if reader is None:
                raise ErnieQuantError(f"{document.where} has images, but the model is text-only")
            if len(with_images) < config.samples * SURPLUS:
                with_images.append(document)
        elif tokens < config.wanted:
            text = _Text(document)
            ids = token_ids(tokenizer, text).int()
            if not text.has_words or not ids.numel():
                empty += 1
                continue
            rendered = rendered or text.beginning
            if end is not None:
                ids = torch.cat([ids, torch.tensor([end], dtype=torch.int32)])
            tables.append(ids)
            tokens += ids.numel()
        enough_images = not with_images or len(with_images) >= config.samples * SURPLUS
        if tokens >= config.wanted and enough_images:
            break
    windows = [
        *_text_windows(torch.cat(tables) if tables else torch.zeros(0), config),
        *_image_windows(with_images, config, reader),
    ]
    if not windows:
        raise no_text(f"calibration text {config.source}")
    if with_images and not rendered:
        rendered = str(with_images[0].record)[:SHOWN]
    return CalibrationWindows(tuple(windows), hash_inputs(windows), rendered, empty)


class _Text:
    """A text that remembers, as it passes, how it begins and whether there are words in it."""

    def __init__(self, parts: Iterable[str]):
        self._parts = parts
        self.beginning = ""
        self.has_words = False

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            if len(self.beginning) < SHOWN:
                self.beginning = (self.beginning + part[:SHOWN])[:SHOWN]
            self.has_words = self.has_words or bool(part.strip())
            yield part


def image_records(config: CalibrationConfig) -> int | None:
    """Number of records with images in a source; None if only reading all of it would tell.

    Raises:
        ErnieQuantError: the source cannot be read.
    """
    if config.source.startswith("hf:"):
        return None
    if config.source == "builtin":
        from erniequant_data import calibration_images

        return sum(has_images(record) for record, _ in read_records(calibration_images()))
    path = source_file(config.source)
    if kind_of(path) == "text":
        return 0
    return sum(has_images(record) for record, _ in read_records(path))


def _text_windows(stream: torch.Tensor, config: CalibrationConfig) -> list[ModelInput]:
    """Windows int64 of a stream int32 ``[n]``."""
    if stream.numel() < 2:
        return []
    count = max(stream.numel() // config.length, 1)
    return [
        ModelInput(stream[i * config.length : (i + 1) * config.length].long())
        for i in _choice(count, config)
    ]


def _image_windows(
    documents: Sequence[ImageDocument], config: CalibrationConfig, reader: ImageTextReader | None
) -> list[ModelInput]:
    if reader is None:
        return []
    chosen = (documents[i] for i in _choice(len(documents), config))
    return [reader.read(entry.record, entry.where, entry.folder) for entry in chosen]


def _choice(count: int, config: CalibrationConfig) -> list[int]:
    """Up to ``config.samples`` of ``count`` things, ascending."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen: list[int] = torch.randperm(count, generator=generator)[: config.samples].tolist()
    return sorted(chosen)
