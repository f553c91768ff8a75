"""wint4 with error feedback (GPTQ, arXiv 2210.17323, in the form of LDLQ, arXiv 2307.13304).

The format has one symmetric scale per output over all inputs, so an output channel is encoded from
a few starts and keeps what leaves the least error under the Hessian. One of them is plain rounding:
no channel becomes worse than that, even where feedback fails (one or two massive inputs).
"""

from collections.abc import Iterable

import torch

from erniequant.encoding.hessian import all_finite, factorise
from erniequant.encoding.ldlq import BLOCK
from erniequant.formats.fastdeploy.packers import WINT4, PackedMatrix

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Scales tried, as fractions of the one that clips nothing; Gaussian channels take 0.8."""


def quantize_wint4(weight: torch.Tensor, hessian: torch.Tensor) -> PackedMatrix:
    """Quantise a matrix of an expert to wint4.

    Args:
        weight: float ``[N, K]``, as in ``nn.Linear``; it is not rounded to bfloat16 first.
        hessian: float32 ``[K, K]``, second moments of the inputs. Without a usable one, errors
            count alike and nothing is fed back.

    Returns:
        int8 ``[N / 2, K]`` and bfloat16 scales ``[N]``.

    Raises:
        ValueError: the layout does not cover such a matrix.
    """
    rows = weight.float().T.contiguous()
    WINT4.packed_shape(*rows.shape)
    if not all_finite(hessian) or not float(hessian.diagonal().sum()) > 0:
        hessian = torch.eye(len(rows))
    # The last row is encoded first: the row with the most energy, which then corrects no other's.
    order = hessian.diagonal().argsort(stable=True)
    ordered, moments = rows[order], hessian[order][:, order]
    feedback = factorise(moments).feedback
    full = WINT4.scale_of(rows)
    best = _Best(ordered, moments)
    best.offer(_nearest(ordered, full), full)
    for scale in (full, _clipped_scale(ordered, moments.diagonal())):
        codes = _encode(ordered, feedback, scale)
        best.offer(codes, scale)
        best.offer(codes, best.fitted(codes, scale))
    natural = torch.empty_like(best.codes)
    natural[order] = best.codes
    return PackedMatrix(WINT4.pack(natural.to(torch.int8)), best.scale)


class _Best:
    """Codes ``[K, N]`` and scale ``[N]`` with the least ``e^T H e`` in every output so far."""

    def __init__(self, rows: torch.Tensor, hessian: torch.Tensor):
        self._rows, self._hessian = rows, hessian
        self._loss = torch.full(rows.shape[1:], torch.inf)
        self.codes = torch.zeros_like(rows)
        self.scale = torch.zeros(rows.shape[1], dtype=torch.bfloat16)

    def offer(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """Take over the outputs where these are better."""
        error = self._rows - codes * scale.float()
        loss = (error * (self._hessian @ error)).sum(0)
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        self.scale = torch.where(better, scale, self.scale)
        self.codes = torch.where(better, codes, self.codes)

    def fitted(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The scale that suits the codes best; ``scale`` where there is none."""
        of_codes = self._hessian @ codes
        fitted = (of_codes * self._rows).sum(0) / (of_codes * codes).sum(0)
        usable = fitted.isfinite() & (fitted > 0)
        return torch.where(usable, fitted, scale.float()).to(torch.bfloat16)


def _nearest(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes of rows ``[..., N]`` as floats; 0 where the scale is."""
    codes = (rows / scale.float()).round().clamp(-WINT4.largest, WINT4.largest)
    return codes.nan_to_num(nan=0.0)


def _clipped_scale(rows: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The fraction of the full scale with the least rounding error, rows weighted ``[K]``."""
    full = WINT4.scale_of(rows).float()
    scales = [(full * shrink).to(torch.bfloat16) for shrink in _SHRINK]
    losses = torch.stack(list(_rounding_losses(rows, scales, importance)))
    return torch.stack(scales).gather(0, losses.argmin(0, keepdim=True))[0]


def _rounding_losses(
    rows: torch.Tensor, scales: Iterable[torch.Tensor], importance: torch.Tensor
) -> Iterable[torch.Tensor]:
    for scale in scales:
        error = rows - _nearest(rows, scale) * scale.float()
        yield importance @ error.square()


def _encode(rows: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes of rows from the last to the first, each aiming at its weights plus the feedback of the
    errors so far; see `erniequant.encoding.ldlq`."""
    codes, error = torch.empty_like(rows), torch.zeros_like(rows)
    step = scale.float()
    for end in range(len(rows), 0, -BLOCK):
        start = max(end - BLOCK, 0)
        aim = rows[start:end] + feedback[end:, start:end].T @ error[end:]
        for k in range(end - 1, start - 1, -1):
            target = aim[k - start] + feedback[k + 1 : end, k] @ error[k + 1 : end]
            codes[k] = _nearest(target, scale)
            error[k] = rows[k] - codes[k] * step
    return codes
