"""Perplexity of a causal language model on a text and, against a reference model, how far it moved.

Protocol: token ids of the whole text without any special token, windows as `windows.cut_windows`
says, negative log-likelihood per token in float32, perplexity = exp of the mean. Hashes of the
text and of the token ids go with every figure, because figures from different texts or tokenizers
do not compare.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from erniequant.errors import ErnieQuantError
from erniequant.evaluate.windows import Window, cut_windows, group_windows
from erniequant.progress import NULL_PROGRESS, Progress
from erniequant.texts import hash_token_ids

DEFAULT_CONTEXT = 2048
# Rows of logits turned into float32 at once: 256 x 103 424 words is 106 MB a model.
ROWS_AT_ONCE = 256
# Short windows share a forward pass up to this many tokens; a default window fills one alone.
TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class ReferenceResult:
    """The reference model on the same tokens, and the distance to it (means over scored tokens)."""

    perplexity: float
    ratio: float
    ratio_stderr: float
    kl_mean: float
    kl_p90: float
    top1_agreement: float


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
    text: str,
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
    tokens: use only the first so many tokens of the text.

    Standard errors are clustered by window: tokens of one window share their context, so their
    errors are correlated and a window counts as one observation. With a single window there is
    nothing to cluster; the error is then the plain token-level one and a lower bound. The error
    of the perplexity and of the ratio is that of the mean (difference of) log-likelihood, carried
    through exp; the ratio's is paired, token by token. KL is KL(reference || model) over the
    whole vocabulary.

    Raises ErnieQuantError for a text too short, an impossible context or stride, vocabularies that
    differ, and logits that are not finite.
    """
    token_ids = tokenize(tokenizer, text)[:tokens]
    context = _choose_context(model, context)
    stride = context if stride is None else stride
    windows = cut_windows(len(token_ids), context, stride)
    scores = _Scores()
    watch = progress or NULL_PROGRESS
    watch.start(len(windows))
    try:
        for group in group_windows(windows, TOKENS_PER_PASS):
            _score(model, reference, token_ids, group, scores)
            watch.advance(len(group), "scoring")
    finally:
        watch.finish()

    nll, cluster = np.concatenate(scores.nll), np.concatenate(scores.cluster)
    ppl = _exp(nll.mean())
    return PerplexityResult(
        perplexity=ppl,
        stderr=ppl * standard_error(nll, cluster),
        tokens=len(nll),
        windows=len(windows),
        context=min(context, len(token_ids)),
        stride=min(stride, len(token_ids)),
        text_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        token_ids_sha256=hash_token_ids(token_ids),
        bos=False,
        reference=None if reference is None else _compare(nll, cluster, scores),
    )


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of the whole text, int64 [n], without BOS or any other added token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.as_tensor(ids, dtype=torch.int64).reshape(-1)


def standard_error(values: np.ndarray, cluster: np.ndarray) -> float:
    """Standard error of the mean of `values` [n] whose errors are correlated within a cluster.

    cluster: int [n], the cluster of each value. Zero values give zero; one cluster falls back to
    the error of independent values.
    """
    residual = values - values.mean()
    labels, member = np.unique(cluster, return_inverse=True)
    if len(labels) > 1:
        residual = np.bincount(member, weights=residual)
    groups = len(residual)
    if groups < 2:
        return 0.0
    return float(np.sqrt(groups / (groups - 1) * np.square(residual).sum()) / len(values))


class _Scores:
    """Per-token results in order of scoring, one float64 or int array per forward pass."""

    def __init__(self) -> None:
        self.nll: list[np.ndarray] = []
        self.cluster: list[np.ndarray] = []
        self.reference_nll: list[np.ndarray] = []
        self.kl: list[np.ndarray] = []
        self.agree: list[np.ndarray] = []


@torch.inference_mode()
def _score(
    model: nn.Module,
    reference: nn.Module | None,
    token_ids: Tensor,
    group: list[Window],
    scores: _Scores,
) -> None:
    inputs = torch.stack([token_ids[w.begin : w.end] for w in group])
    logits = _logits(model, inputs)
    other = None if reference is None else _logits(reference, inputs)
    if other is not None and other.shape != logits.shape:
        raise ErnieQuantError(
            f"the model has {logits.shape[-1]} words and the reference {other.shape[-1]}: "
            "compare a model with the one it was made from"
        )
    for row, window in enumerate(group):
        for begin, end in _chunks(window.first_scored, window.end):
            # Position p predicts token p + 1, so the scores of tokens begin:end stand one earlier.
            where = slice(begin - 1 - window.begin, end - 1 - window.begin)
            target = token_ids[begin:end]
            log_p = _log_softmax(logits[row, where], window)
            nll = _nll(log_p, target)
            scores.nll.append(nll)
            scores.cluster.append(np.full(len(nll), window.begin))
            if other is not None:
                log_q = _log_softmax(other[row, where], window).to(log_p.device)
                scores.reference_nll.append(_nll(log_q, target))
                # Rounding takes the divergence of all but equal models below zero.
                kl = (log_q.exp() * (log_q - log_p)).sum(-1).clamp(min=0)
                scores.kl.append(_array(kl))
                scores.agree.append(_array(log_q.argmax(-1) == log_p.argmax(-1)))


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=inputs.to(_device(model)), use_cache=False).logits
    return logits


def _log_softmax(logits: Tensor, window: Window) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    if not torch.isfinite(log_p).all():
        raise ErnieQuantError(
            f"the model gives logits that are not finite in tokens {window.begin} to {window.end}: "
            "run `erniequant verify` on it, or load it with --dtype float32"
        )
    return log_p


def _nll(log_p: Tensor, target: Tensor) -> np.ndarray:
    return _array(-log_p.gather(-1, target.to(log_p.device)[:, None])[:, 0])


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float64)


def _chunks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, ROWS_AT_ONCE):
        yield start, min(start + ROWS_AT_ONCE, end)


def _compare(nll: np.ndarray, cluster: np.ndarray, scores: _Scores) -> ReferenceResult:
    reference_nll, kl = np.concatenate(scores.reference_nll), np.concatenate(scores.kl)
    difference = nll - reference_nll
    ratio = _exp(difference.mean())
    return ReferenceResult(
        perplexity=_exp(reference_nll.mean()),
        ratio=ratio,
        ratio_stderr=ratio * standard_error(difference, cluster),
        kl_mean=float(kl.mean()),
        kl_p90=float(np.quantile(kl, 0.9)),
        top1_agreement=float(np.concatenate(scores.agree).mean()),
    )


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


def _exp(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
