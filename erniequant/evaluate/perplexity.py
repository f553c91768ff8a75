"""Perplexity of a causal language model on a text and, against a reference model, how far it moved.

Protocol: token ids of the whole text without any special token, windows as `windows.cut_windows`
says, negative log-likelihood per token in float32, perplexity = exp of the mean. Hashes of the
text and of the token ids go with every figure, because figures from different texts or tokenizers
do not compare.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erniequant.data.files import no_text, text_blocks
from erniequant.data.token_hash import hash_token_ids
from erniequant.data.tokens import encoded, token_ids
from erniequant.errors import ErnieQuantError
from erniequant.evaluate.scoring import ReferenceResult, Scores
from erniequant.evaluate.windows import Window, cut_windows, group_windows
from erniequant.paths import expanded
from erniequant.progress import Progress, observed

DEFAULT_CONTEXT = 2048
# Short windows share a forward pass up to this many tokens; a default window fills one alone.
TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity with what it takes to repeat it; `tokens` counts scored tokens."""

    perplexity: float
    stderr: float
    tokens: int
    windows: int
    context: int
    stride: int
    text_sha256: str
    token_ids_sha256: str
    bos: bool
    reference: ReferenceResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `reference` is left out where there was none."""
        result = asdict(self)
        if self.reference is None:
            del result["reference"]
        return result


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Path,
    *,
    reference: nn.Module | None = None,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score `text` under `model`, and under `reference` on the same tokens if given.

    model, reference: called as `model(input_ids=[B, S] int64, use_cache=False)`, giving `.logits`
    [B, S, vocabulary] of any float type. context: tokens per window, default 2048 or the model's
    `max_position_embeddings` if that is less, never more than the text. stride: default context.
    tokens: use only this many tokens from the start of the text. text: the text itself, or the path
    of a UTF-8 file, which is read a block at a time, and tokenised as far as it is used.

    Standard errors are clustered by window: tokens of one window share their context, so their
    errors are correlated and a window counts as one observation. With a single window there is
    nothing to cluster; the error is then the plain token-level one and a lower bound. The error
    of the perplexity and of the ratio is that of the mean (difference of) log-likelihood, carried
    through exp; the ratio's is paired, token by token. KL is KL(reference || model) over the
    whole vocabulary.

    Raises ErnieQuantError for anything that is not a text, a text too short, an impossible context
    or stride, vocabularies that differ, and logits that are not finite.
    """
    token_ids, text_sha256 = _read(tokenizer, text, tokens)
    context = _choose_context(model, context)
    stride = context if stride is None else stride
    windows = cut_windows(len(token_ids), context, stride)
    scores = Scores()
    watch = observed(progress)
    watch.start(len(windows))
    try:
        for group in group_windows(windows, TOKENS_PER_PASS):
            _score(model, reference, token_ids, group, scores)
            watch.advance(len(group), "scoring")
    finally:
        watch.finish()

    ppl, stderr = scores.perplexity()
    return PerplexityResult(
        perplexity=ppl,
        stderr=stderr,
        tokens=len(scores.nll),
        windows=len(windows),
        context=min(context, len(token_ids)),
        stride=min(stride, len(token_ids)),
        text_sha256=text_sha256,
        token_ids_sha256=hash_token_ids(token_ids),
        bos=False,
        reference=scores.compare(),
    )


def tokenize(tokenizer: Any, text: str | Path, at_most: int | None = None) -> Tensor:
    """The first token ids of a text, int64 [n], without BOS or any other added token.

    Raises ErnieQuantError if it is not a text or cannot be read.
    """
    return token_ids(tokenizer, _parts(text), at_most)


def _read(tokenizer: Any, text: str | Path, at_most: int | None) -> tuple[Tensor, str]:
    """Token ids, and the SHA-256 of all of the text."""
    parts = _Hashed(_parts(text))
    ids = token_ids(tokenizer, parts, at_most)
    if not parts.finish() and isinstance(text, Path):
        raise no_text(text)
    return ids, parts.digest.hexdigest()


class _Hashed:
    """Parts of a text, hashed as they pass."""

    def __init__(self, parts: Iterator[str]):
        self._parts = parts
        self._has_words = False
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            self._has_words = self._has_words or bool(part.strip())
            self.digest.update(encoded(part))
            yield part

    def finish(self) -> bool:
        """Hash the rest of the text; True if all of it held more than white space."""
        for _ in self:
            pass
        return self._has_words


def _parts(text: str | Path) -> Iterator[str]:
    if isinstance(text, str):
        return iter([text])
    if isinstance(text, Path):
        return text_blocks(expanded(text))
    raise ErnieQuantError(
        f"the text is of type {type(text).__name__}; give one str, or the pathlib.Path of a file"
    )


@torch.inference_mode()
def _score(
    model: nn.Module,
    reference: nn.Module | None,
    token_ids: Tensor,
    group: list[Window],
    scores: Scores,
) -> None:
    inputs = torch.stack([token_ids[w.begin : w.end] for w in group])
    logits = _logits(model, inputs)
    other = None if reference is None else _logits(reference, inputs)
    for row, window in enumerate(group):
        # Position p predicts token p + 1, so the scores of tokens begin:end stand one earlier.
        where = slice(window.first_scored - 1 - window.begin, window.end - 1 - window.begin)
        scores.add(
            logits[row, where],
            None if other is None else other[row, where],
            token_ids[window.first_scored : window.end],
            window.begin,
            f"tokens {window.begin} to {window.end}",
        )


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=inputs.to(_device(model)), use_cache=False).logits
    return logits


def _choose_context(model: nn.Module, context: int | None) -> int:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if context is None:
        return min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise ErnieQuantError(
            f"context {context} is more than the {longest} positions of the model: "
            f"use a context of {longest} or less"
        )
    return context


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
