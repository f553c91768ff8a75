"""Perplexity of text given the images that go with it.

Protocol: every record is a sequence of its own; the text tokens after its first image are scored,
each given everything before it. Image tokens and the end of the text are not.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erniequant.data.given import BATCHES, RECORDS, Given, given, kind_of_members, members
from erniequant.data.image_inputs import reader_for
from erniequant.data.image_records import has_images
from erniequant.data.inputs import ModelInput, hash_inputs, sequences_of
from erniequant.data.records import read_records
from erniequant.errors import ErnieQuantError
from erniequant.evaluate.scoring import ReferenceResult, Scores
from erniequant.models.registry import image_settings
from erniequant.paths import expanded
from erniequant.progress import Progress, observed

# Text of a record beyond this is cut.
MAX_TOKENS = 4096


@dataclass(frozen=True)
class ImageTextResult:
    """Perplexity with what it takes to repeat it; `tokens` counts scored tokens, ``nll`` is their
    mean negative log-likelihood."""

    perplexity: float
    stderr: float
    nll: float
    tokens: int
    records: int
    images: int
    vision_tokens: int
    inputs_sha256: str
    reference: ReferenceResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `reference` is left out where there was none."""
        result = asdict(self)
        if self.reference is None:
            del result["reference"]
        return result


def image_perplexity(
    model: nn.Module,
    tokenizer: Any,
    records: str | Path | Iterable[Any] = "builtin",
    *,
    reference: nn.Module | None = None,
    progress: Progress | None = None,
) -> ImageTextResult:
    """Score the text of image-text records under ``model``, and under ``reference`` if given.

    Args:
        records: "builtin", a file of records (see `erniequant.data.image_records`), or the records
            themselves, inputs or batches that are ready for the model.

    Standard errors are clustered by record.

    Raises:
        ErnieQuantError: the model takes no images, a record cannot be read, there is no text to
            score, or logits are not finite.
    """
    inputs = evaluation_inputs(model, tokenizer, records)
    scores = Scores()
    watch = observed(progress)
    watch.start(len(inputs))
    try:
        for number, entry in enumerate(inputs):
            _score(model, reference, entry, number, tokenizer, scores)
            watch.advance(1, "scoring text given images")
    finally:
        watch.finish()
    value, stderr = scores.perplexity()
    return ImageTextResult(
        perplexity=value,
        stderr=stderr,
        nll=float(scores.nll.mean()),
        tokens=len(scores.nll),
        records=len(inputs),
        images=sum(len(entry.images) for entry in inputs),
        vision_tokens=sum(int(e.vision.sum()) for e in inputs if e.vision is not None),
        inputs_sha256=hash_inputs(inputs),
        reference=scores.compare(),
    )


def evaluation_inputs(
    model: nn.Module, tokenizer: Any, records: str | Path | Iterable[Any]
) -> list[ModelInput]:
    """The model's input for each record.

    Raises:
        ErnieQuantError: as `image_perplexity`.
    """
    source = given(records, "records", "leave it out for the built-in ones")
    if isinstance(source, str):
        path = expanded(source)
        if source == "builtin":
            from erniequant_data import heldout_images

            path = heldout_images()
        reader = reader_for(model, tokenizer, length=MAX_TOKENS)
        named_records = read_records(path)
        inputs = [reader.read(r, where, path.parent) for r, where in named_records if has_images(r)]
    else:
        inputs = _given_inputs(model, tokenizer, source)
    if not any(_scored(entry, tokenizer).numel() for entry in inputs):
        raise ErnieQuantError(
            f"{source if isinstance(source, str) else 'the input'} has no text after an "
            "image; give records with image and text"
        )
    return inputs


def _given_inputs(model: nn.Module, tokenizer: Any, source: Given) -> list[ModelInput]:
    kind, data = kind_of_members(source)
    if kind == BATCHES:
        config = getattr(model, "config", None)
        images = None if config is None else image_settings(config)
        return [
            i for batch, where in members(data, kind) for i in sequences_of(batch, images, where)
        ]
    if kind != RECORDS:
        raise ErnieQuantError(f"records holds {kind}; give records with images")
    reader = reader_for(model, tokenizer, length=MAX_TOKENS)
    return [reader.read(r, where, Path()) for r, where in members(data, kind) if has_images(r)]


def _scored(entry: ModelInput, tokenizer: Any) -> Tensor:
    """Positions of the tokens to score, int64 ``[n]``."""
    if entry.vision is None:
        return torch.zeros(0, dtype=torch.int64)
    behind = entry.vision.cumsum(0) > 0
    text = behind & ~entry.vision
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and int(entry.ids[-1]) == end:
        text[-1] = False
    return torch.where(text)[0]


@torch.inference_mode()
def _score(
    model: nn.Module,
    reference: nn.Module | None,
    entry: ModelInput,
    number: int,
    tokenizer: Any,
    scores: Scores,
) -> None:
    places = _scored(entry, tokenizer)
    if not places.numel():
        return
    other = None if reference is None else _logits(reference, entry)[places - 1]
    scores.add(
        _logits(model, entry)[places - 1], other, entry.ids[places], number, f"record {number}"
    )


def _logits(model: Any, entry: ModelInput) -> Tensor:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in entry.batch().items()}
    logits: Tensor = model(**batch, use_cache=False).logits[0]
    return logits
