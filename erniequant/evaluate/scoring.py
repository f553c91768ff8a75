"""Scores of tokens under a model and their distance to a reference, token by token.

Standard errors are clustered: tokens of one window or record share their context, so their errors
are correlated and a window or record counts as one observation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from erniequant.errors import ErnieQuantError

# Rows of logits turned into float32 at once: 256 x 103 424 words is 106 MB a model.
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ReferenceResult:
    """The reference model on the same tokens, and the distance to it (means over scored tokens)."""

    perplexity: float
    ratio: float
    ratio_stderr: float
    kl_mean: float
    kl_p90: float
    top1_agreement: float


class Scores:
    """Scores of tokens in the order in which they were added."""

    def __init__(self) -> None:
        self._nll: list[np.ndarray] = []
        self._cluster: list[np.ndarray] = []
        self._reference_nll: list[np.ndarray] = []
        self._kl: list[np.ndarray] = []
        self._agree: list[np.ndarray] = []

    @property
    def nll(self) -> np.ndarray:
        """Negative log-likelihood of every token, float64 ``[n]``."""
        return np.concatenate(self._nll)

    @property
    def cluster(self) -> np.ndarray:
        """The cluster of every token, int ``[n]``."""
        return np.concatenate(self._cluster)

    def add(
        self, logits: Tensor, reference: Tensor | None, target: Tensor, cluster: int, where: str
    ) -> None:
        """Score ``target`` int64 ``[n]`` by the logits ``[n, vocabulary]`` that predict it.

        Raises:
            ErnieQuantError: vocabularies differ, or logits are not finite; ``where`` names the
                tokens.
        """
        if reference is not None and reference.shape[-1] != logits.shape[-1]:
            raise ErnieQuantError(
                f"the model has {logits.shape[-1]} words and the reference "
                f"{reference.shape[-1]}: compare a model with the one it was made from"
            )
        for part in _chunks(len(target)):
            log_p = _log_softmax(logits[part], where)
            nll = _nll(log_p, target[part])
            self._nll.append(nll)
            self._cluster.append(np.full(len(nll), cluster))
            if reference is not None:
                log_q = _log_softmax(reference[part], where).to(log_p.device)
                self._reference_nll.append(_nll(log_q, target[part]))
                # Rounding takes the divergence of all but equal models below zero.
                self._kl.append(_array((log_q.exp() * (log_q - log_p)).sum(-1).clamp(min=0)))
                self._agree.append(_array(log_q.argmax(-1) == log_p.argmax(-1)))

    def perplexity(self) -> tuple[float, float]:
        """Perplexity, exp of the mean, and its standard error, carried through exp."""
        nll = self.nll
        value = _exp(nll.mean())
        return value, value * standard_error(nll, self.cluster)

    def compare(self) -> ReferenceResult | None:
        """The distance to the reference, if there was one; the ratio's error is paired."""
        if not self._kl:
            return None
        reference_nll, kl = np.concatenate(self._reference_nll), np.concatenate(self._kl)
        difference = self.nll - reference_nll
        ratio = _exp(difference.mean())
        return ReferenceResult(
            perplexity=_exp(reference_nll.mean()),
            ratio=ratio,
            ratio_stderr=ratio * standard_error(difference, self.cluster),
            kl_mean=float(kl.mean()),
            kl_p90=float(np.quantile(kl, 0.9)),
            top1_agreement=float(np.concatenate(self._agree).mean()),
        )


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


def _log_softmax(logits: Tensor, where: str) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    if not torch.isfinite(log_p).all():
        raise ErnieQuantError(
            f"the model gives logits that are not finite in {where}: "
            "run `erniequant verify` on it, or load it with --dtype float32"
        )
    return log_p


def _nll(log_p: Tensor, target: Tensor) -> np.ndarray:
    return _array(-log_p.gather(-1, target.to(log_p.device)[:, None])[:, 0])


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float64)


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS_AT_ONCE):
        yield slice(start, start + ROWS_AT_ONCE)


def _exp(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
