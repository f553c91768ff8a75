"""Calibration text: from the built-in collection, a file, JSONL or a data set to windows of token
ids, with images where the model takes them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.inputs import ModelInput, from_batch, hash_inputs
from erniequant.models.images import ImageSettings
from erniequant.texts import read_text
from erniequant.vision.records import ImageTextReader, has_images, read_records

SURPLUS = 16
"""Reading stops at this many times the tokens asked for; a random choice of windows needs no
more."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text to calibrate on, and how much of it.

    ``source`` is ``builtin``, a path ending in .txt or .jsonl, or ``hf:NAME[:SPLIT[:COLUMN]]``;
    records of JSONL and data sets may have images (`erniequant.vision.records`).
    ``chat_template`` ``apply`` renders chat ``messages`` with the model's template, ``none`` joins
    their contents.
    """

    source: str = "builtin"
    samples: int = 128
    length: int = 1024
    chat_template: str = "apply"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise ErnieQuantError("calibration needs at least 1 sample of at least 2 tokens")
        if self.chat_template not in ("apply", "none"):
            raise ErnieQuantError(
                f"chat template must be apply or none, not {self.chat_template!r}"
            )


@dataclass(frozen=True, eq=False)
class CalibrationWindows:
    """What to calibrate on, and where it came from.

    ``windows`` are windows of text, then documents with images. ``sha256`` is `hash_inputs` of all
    of them; ``rendered`` shows the start of the first document.
    """

    windows: tuple[ModelInput, ...]
    sha256: str
    rendered: str

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.windows))

    @property
    def vision_tokens(self) -> int:
        """Those of them that go to experts for images."""
        return sum(int(w.vision.sum()) for w in self.windows if w.vision is not None)

    @property
    def images(self) -> int:
        """Images in all windows."""
        return sum(len(window.pictures) for window in self.windows)


@dataclass(frozen=True)
class ImageDocument:
    """A record with images that was not looked at yet; paths in it are relative to ``folder``."""

    record: Any
    where: str
    folder: Path


def calibration_windows(
    tokenizer: Any, config: CalibrationConfig, reader: ImageTextReader | None = None
) -> CalibrationWindows:
    """Tokenise the source, cut its text into windows of ``config.length``, and choose
    ``config.samples`` of them and as many documents with images.

    Documents follow one another, separated by the end-of-text token where the tokenizer has one;
    no BOS is added. A source shorter than one window yields one shorter window. A document with
    images is a window of its own.

    Args:
        reader: of a model that takes images.

    Raises:
        ErnieQuantError: the source cannot be read, holds no text, or has images that the model
            does not take.
    """
    wanted = config.samples * config.length * SURPLUS
    ids: list[int] = []
    with_images: list[ImageDocument] = []
    rendered = ""
    for document in documents(config, tokenizer, images=reader is not None):
        if isinstance(document, ImageDocument):
            if reader is None:
                raise ErnieQuantError(
                    f"{document.where} has images, but the model takes text alone"
                )
            if len(with_images) < config.samples * SURPLUS:
                with_images.append(document)
        elif len(ids) < wanted:
            rendered = rendered or document[:400]
            with foreign_errors(f"the tokenizer cannot read {config.source}"):
                ids += tokenizer(document, add_special_tokens=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
        enough_images = not with_images or len(with_images) >= config.samples * SURPLUS
        if len(ids) >= wanted and enough_images:
            break
    windows = [
        *_text_windows(torch.tensor(ids, dtype=torch.int64), config),
        *_image_windows(with_images, config, reader),
    ]
    if not windows:
        raise ErnieQuantError(
            f"calibration text {config.source} holds no text; give another source"
        )
    if with_images and not rendered:
        rendered = str(with_images[0].record)[:400]
    return CalibrationWindows(tuple(windows), hash_inputs(windows), rendered)


def image_records(config: CalibrationConfig) -> int | None:
    """How many records with images a source has; None where only reading all of it would tell.

    Raises:
        ErnieQuantError: the source cannot be read.
    """
    if config.source.startswith("hf:"):
        return None
    if config.source == "builtin":
        from erniequant_data import calibration_images

        return sum(has_images(record) for record, _ in read_records(calibration_images()))
    if config.source.endswith(".jsonl"):
        return sum(has_images(record) for record, _ in read_records(Path(config.source)))
    return 0


def batched_windows(
    batches: Sequence[Mapping[str, Any]], images: ImageSettings | None
) -> CalibrationWindows:
    """Batches that are ready for the model, as transformers' processors make them.

    Raises:
        ErnieQuantError: there is none, or one contradicts itself or the model.
    """
    windows = [
        window
        for number, batch in enumerate(batches)
        for window in from_batch(batch, images, f"calibration batch {number}")
        if len(window)
    ]
    if not windows:
        raise ErnieQuantError("the calibration batches hold no tokens; give at least one sequence")
    return CalibrationWindows(tuple(windows), hash_inputs(windows), "")


def _text_windows(stream: torch.Tensor, config: CalibrationConfig) -> list[ModelInput]:
    if stream.numel() < 2:
        return []
    count = max(stream.numel() // config.length, 1)
    return [
        ModelInput(stream[i * config.length : (i + 1) * config.length])
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


def documents(
    config: CalibrationConfig, tokenizer: Any, images: bool = False
) -> Iterator[str | ImageDocument]:
    """The documents of a source, chat messages rendered; ``images``: built-in ones too."""
    source = config.source
    if source == "builtin":
        from erniequant_data import calibration_images, calibration_text

        if images:
            path = calibration_images()
            for record, where in read_records(path):
                yield ImageDocument(record, where, path.parent)
        yield calibration_text()
    elif source.startswith("hf:"):
        yield from _dataset(source, config, tokenizer)
    elif source.endswith(".jsonl"):
        path = Path(source)
        for record, where in read_records(path):
            yield _document(record, config, tokenizer, where, path.parent)
    elif source.endswith(".txt"):
        yield read_text(Path(source))
    else:
        raise ErnieQuantError(
            f"calibration source {source!r} is none of builtin, FILE.txt, FILE.jsonl, "
            "hf:NAME[:SPLIT[:COLUMN]]"
        )


def _document(
    record: Any, config: CalibrationConfig, tokenizer: Any, where: str, folder: Path
) -> str | ImageDocument:
    if has_images(record):
        return ImageDocument(record, where, folder)
    return render(record, config, tokenizer, where)


def _dataset(
    source: str, config: CalibrationConfig, tokenizer: Any
) -> Iterator[str | ImageDocument]:
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the data set library raises many unrelated types
        reason = " ".join(str(error).split())
        raise ErnieQuantError(f"cannot load data set {name}: {reason}") from error
    for number, row in enumerate(rows):
        record = {**row, "text": row[column]} if column and column in row else row
        yield _document(record, config, tokenizer, f"data set {name} row {number}", Path())


def render(record: Any, config: CalibrationConfig, tokenizer: Any, where: str) -> str:
    """One document of a record with ``text`` or chat ``messages``.

    Raises:
        ErnieQuantError: neither field is there, or there is no template to render messages with.
    """
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise ErnieQuantError(f'{where} has neither "text" nor "messages" with role and content')
    if config.chat_template == "none":
        return "\n".join(message["content"] for message in messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ErnieQuantError(
            f"{where} holds chat messages but the tokenizer has no chat template; use "
            "--chat-template none"
        )
    with foreign_errors(f"{where}: the chat template cannot render its messages"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
