"""Quantise one matrix for given input moments: rotate, order, scale, encode with feedback, refit
the scale."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from erniequant.calibration.hessian import Factor, factorise
from erniequant.codes.spec import ConvolutionalCode
from erniequant.codes.viterbi import Encoder, encoder
from erniequant.format.decoding import encode_scale
from erniequant.quantization.ldlq import encode_matrix
from erniequant.rotation import rotate, unrotate

SCALE_IN_RMS = {2: 0.96, 3: 0.92, 4: 0.88}
"""Standard deviation of the scaled targets over that of the labels, best on N(0, 1); see
docs/codes.md."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """Input rotation of a projection, shared by all experts of a layer: signs float32 ``[K]`` and
    block size."""

    signs: torch.Tensor
    block: int


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """One packed matrix and what became of it.

    ``packed`` int32 ``[N / T, K * T * bits / 32]``, ``scale`` float32 ``[N]`` with bfloat16
    values, ``effective`` float32 ``[N, K]``: the weights that the packed form stands for,
    unrotated. ``error`` is ``tr(E H E^T) / tr(W H W^T)``.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    effective: torch.Tensor
    error: float
    damping: float
    fallback: str | None

    def scale_bits(self) -> torch.Tensor:
        """The scale as stored: int16 ``[N, 1]``, bfloat16 bit patterns."""
        return encode_scale(self.scale)[:, None]

    def stored(self) -> "QuantizedMatrix":
        """Without the float32 weights: what has to be kept until the layer is written."""
        return replace(self, effective=torch.empty(0))


def quantize_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    importance: torch.Tensor,
    rotation: Rotation,
    code: ConvolutionalCode,
    tile: int,
) -> QuantizedMatrix:
    """Quantise ``weight`` float32 ``[N, K]`` for inputs with second moments ``hessian`` float32
    ``[K, K]``.

    Args:
        importance: float32 ``[N]``, non-negative: how much the squared error of each output counts.
            Sequences run along the outputs, so the search trades errors between them.
    """
    search = encoder(code)
    rotated = rotate(weight, rotation.signs, rotation.block)
    rotated_hessian = rotate_moments(hessian, rotation)
    # The last row is encoded first; most energy first lowers the output error by 1 %.
    order = rotated_hessian.diagonal().argsort(stable=True)
    ordered_hessian = rotated_hessian[order][:, order].contiguous()
    factor = factorise(ordered_hessian)
    ordered = rotated[:, order].T.contiguous()
    scale = initial_scale(ordered, code, search)
    encoded = encode_matrix(
        ordered, factor.feedback, scale, bounded_importance(importance, scale), search, tile
    )
    scale = refit_scale(encoded.labels, ordered, ordered_hessian, scale)
    return _assemble(weight, hessian, encoded.labels, encoded.words, scale, order, rotation, factor)


def _assemble(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    labels: torch.Tensor,
    words: np.ndarray,
    scale: torch.Tensor,
    order: torch.Tensor,
    rotation: Rotation,
    factor: Factor,
) -> QuantizedMatrix:
    natural = torch.empty_like(labels)
    natural[order] = labels
    by_row = np.empty_like(words)
    by_row[order.numpy()] = words
    packed = torch.from_numpy(by_row.transpose(1, 0, 2).reshape(words.shape[1], -1).view(np.int32))
    effective = unrotate((natural * scale).T, rotation.signs, rotation.block)
    error = relative_error(weight, effective, hessian)
    return QuantizedMatrix(packed, scale, effective, error, factor.damping, factor.fallback)


def rotate_moments(hessian: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Second moments of rotated inputs: ``R H R^T`` for ``rotate(x) = R x``."""
    half = rotate(hessian, rotation.signs, rotation.block)
    return rotate(half.T.contiguous(), rotation.signs, rotation.block)


def initial_scale(rows: torch.Tensor, code: ConvolutionalCode, search: Encoder) -> torch.Tensor:
    """Scale of each output from its root mean square over the inputs ``[K, N]`` -> ``[N]``, never
    zero."""
    label_std = float(search.tables.std())
    rms = rows.square().mean(0).sqrt()
    floor = max(float(rms.max()), 1e-30) * 1e-6
    return rms.clamp_min(floor) / (SCALE_IN_RMS[code.bits] * label_std)


IMPORTANCE_RANGE = 1e3
"""Largest ratio of an output's weight to the mean; keeps float32 path costs of a sequence
comparable."""


def bounded_importance(importance: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Clamp importance so that no position of a sequence counts a thousandth or a thousand times
    the mean."""
    weight = importance * scale**2
    mean = weight.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return torch.ones_like(importance)
    return weight.clamp(mean / IMPORTANCE_RANGE, mean * IMPORTANCE_RANGE) / scale**2


def refit_scale(
    labels: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Least-squares scale of each output given its labels: ``(q^T H w) / (q^T H q)``, rounded to
    bfloat16.

    Args:
        labels, rows: float32 ``[K, N]``.
        hessian: ``[K, K]``, of the same inputs in the same order.
        scale: ``[N]``, kept where the fit is not positive.
    """
    projected = hessian @ labels
    numerator = (projected * rows).sum(0)
    denominator = (projected * labels).sum(0)
    fitted = numerator / denominator
    usable = torch.isfinite(fitted) & (fitted > 0)
    return torch.where(usable, fitted, scale).bfloat16().float()


def relative_error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` of ``[N, K]`` matrices; 0 for a zero matrix."""
    difference = other - weight
    loss = float(((difference @ hessian) * difference).sum(dtype=torch.float64))
    energy = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    return loss / energy if energy > 0 else 0.0
