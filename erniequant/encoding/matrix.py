"""Quantise one matrix for given input moments: rotate, order, scale, encode with feedback, refit
the scale."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from erniequant.codes.registry import target_std
from erniequant.codes.spec import ConvolutionalCode
from erniequant.codes.viterbi import Encoder, encoder
from erniequant.encoding.hessian import ROW_BLOCK, cholesky, factorise
from erniequant.encoding.ldlq import EncodedMatrix, OutputFactor, encode_matrix
from erniequant.encoding.products import symmetric_product
from erniequant.packing.decoding import decode_scale, decode_weight, encode_scale
from erniequant.packing.rotation import hadamard, pack_signs, rotate, unrotate
from erniequant.packing.schema import MatrixSpec


@dataclass(frozen=True, eq=False)
class Rotation:
    """Input rotation of a projection, shared by all experts of a layer: signs float32 ``[K]`` and
    block size."""

    signs: torch.Tensor
    block: int


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """One coded matrix and its error.

    ``parts`` are its tensors as they are stored, by suffix; ``effective`` float32 ``[N, K]`` are
    the weights that they stand for. ``error`` is ``tr(E H E^T) / tr(W H W^T)``, in
    the metric of the outputs where there is one.
    """

    parts: Mapping[str, torch.Tensor]
    effective: torch.Tensor
    error: float
    damping: float
    fallback: str | None

    def stored(self) -> "QuantizedMatrix":
        """The same without the float32 weights: the part that is kept until the layer is
        written."""
        return replace(self, effective=torch.empty(0))


class MatrixQuantizer(Protocol):
    """Coder of the matrices of one projection of a layer, each on its own. Can be pickled."""

    @property
    def inputs(self) -> int:
        """Inputs of a matrix, ``K``."""

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor
    ) -> QuantizedMatrix:
        """Code ``weight`` float32 ``[N, K]`` for inputs with second moments ``hessian`` float32
        ``[K, K]``, which may be overwritten.

        importance: float32 ``[N]``, how much the squared error of each output counts, or
            ``[N, N]``, the metric of the errors of all outputs.
        """

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The effective weights of stored parts, to the last bit those of `quantize`."""

    def rescaled(
        self, parts: Mapping[str, torch.Tensor], factors: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The parts that change when every output is multiplied by its factor, float32 ``[N]``."""


@dataclass(frozen=True, eq=False)
class TrellisQuantizer:
    """The native codes: ``parts`` are ``packed`` int32 ``[N / T, K * T * bits / 32]`` and ``scale``
    int16 ``[N, 1]``, bfloat16 bit patterns."""

    spec: MatrixSpec
    rotation: Rotation
    encoder: Callable[[ConvolutionalCode], Encoder] = encoder

    @property
    def inputs(self) -> int:
        """Inputs of a matrix, ``K``."""
        return self.rotation.signs.numel()

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor
    ) -> QuantizedMatrix:
        """See `quantize_matrix`."""
        return quantize_matrix(
            weight, hessian, importance, self.rotation, self.spec.conv(), self.spec.tile,
            self.encoder,
        )  # fmt: skip

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `decode_weight`."""
        signs = pack_signs(self.rotation.signs)
        return decode_weight(parts["packed"], parts["scale"], signs, self.spec)

    def rescaled(
        self, parts: Mapping[str, torch.Tensor], factors: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See `MatrixQuantizer`."""
        return {"scale": encode_scale(decode_scale(parts["scale"]) * factors[:, None])}


def quantize_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    importance: torch.Tensor,
    rotation: Rotation,
    code: ConvolutionalCode,
    tile: int,
    encoder: Callable[[ConvolutionalCode], Encoder] = encoder,
) -> QuantizedMatrix:
    """Quantise ``weight`` float32 ``[N, K]`` for inputs with second moments ``hessian`` float32
    ``[K, K]``, which is overwritten: a copy is 268 MB at the largest model's size.

    Args:
        importance: float32 ``[N]``, non-negative: how much the squared error of each output counts.
            Sequences run along the outputs, so the search trades errors between them. Or float32
            ``[N, N]``, a metric ``G``: the loss is ``tr(G E H E^T)``, and outputs also make up for
            each other's errors.
    """
    search = encoder(code)
    rotate_moments(hessian, rotation)
    # The last row is encoded first; most energy first lowers the output error by 1 %.
    order = hessian.diagonal().argsort(stable=True)
    reorder_moments(hessian, order)
    factor = factorise(hessian)
    ordered = rotate(weight, rotation.signs, rotation.block)[:, order].T.contiguous()
    scale = initial_scale(ordered, code, search)
    outputs = output_factor(importance, scale, tile)
    encoded = encode_matrix(ordered, factor.feedback, scale, outputs, search, tile)
    damping, fallback = factor.damping, factor.fallback
    del factor
    if outputs.feedback is None:  # no metric, or none that can be used
        scale, error = refit_scale(encoded.labels, ordered, hessian, scale)
    else:
        scale, error = refit_scales_together(encoded.labels, ordered, hessian, scale, importance)
    packed, effective = _in_natural_order(encoded, scale, order, rotation)
    parts = {"packed": packed, "scale": encode_scale(scale)[:, None]}
    return QuantizedMatrix(parts, effective, error, damping, fallback)


def _in_natural_order(
    encoded: EncodedMatrix, scale: torch.Tensor, order: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed words and effective weights with the inputs in the order of the model."""
    natural = torch.empty_like(encoded.labels)
    natural[order] = encoded.labels
    by_row = np.empty_like(encoded.words)
    by_row[order.numpy()] = encoded.words
    words = by_row.transpose(1, 0, 2).reshape(by_row.shape[1], -1)
    effective = unrotate(natural.mul_(scale).T, rotation.signs, rotation.block)
    return torch.from_numpy(words.view(np.int32)), effective


def rotate_moments(hessian: torch.Tensor, rotation: Rotation) -> None:
    """Turn second moments, in place, into those of rotated inputs: ``R H R^T`` for
    ``rotate(x) = R x``."""
    # A product with the transform's matrix: at 128 channels that takes a quarter of the time.
    turn = hadamard(torch.eye(rotation.block), rotation.block)
    for rows in hessian.split(ROW_BLOCK):
        turned = (rows * rotation.signs).unflatten(1, (-1, rotation.block)) @ turn
        rows.copy_(turned.flatten(1))
    for start in range(0, len(hessian), rotation.block):
        rows = hessian[start : start + rotation.block]
        rows.copy_(turn @ (rows * rotation.signs[start : start + rotation.block, None]))


def reorder_moments(hessian: torch.Tensor, order: torch.Tensor) -> None:
    """Put rows and columns of second moments into another order, in place."""
    hessian.copy_(hessian[order])
    for rows in hessian.split(ROW_BLOCK):
        rows.copy_(rows[:, order])


def initial_scale(rows: torch.Tensor, code: ConvolutionalCode, search: Encoder) -> torch.Tensor:
    """Scale of each output from its root mean square over the inputs ``[K, N]`` -> ``[N]``, never
    zero."""
    label_std = float(search.tables.std())
    rms = rows.square().mean(0).sqrt()
    floor = max(float(rms.max()), 1e-30) * 1e-6
    return rms.clamp_min(floor) / (target_std(code) * label_std)


IMPORTANCE_RANGE = 1e3
"""Largest ratio of an output's weight to the mean; keeps float32 path costs of a sequence
comparable."""


OUTPUT_DAMPING = 0.05
"""Damping of the metric of outputs, as a fraction of its mean diagonal."""


def output_factor(importance: torch.Tensor, scale: torch.Tensor, tile: int) -> OutputFactor:
    """Factor the metric of outputs ``[N, N]``, or take its diagonal ``[N]`` as it is."""
    if importance.dim() == 1:
        return OutputFactor(bounded_weight(importance * scale**2), None)
    metric = importance * scale * scale[:, None]
    ridge = OUTPUT_DAMPING * float(metric.diagonal().mean())
    # Damped enough for float32; an inexact factor costs a little error and nothing else.
    lower = cholesky(metric, ridge, torch.float32)
    if lower is None:
        return output_factor(importance.diagonal(), scale, tile)
    weight = torch.empty_like(scale)
    feedback = torch.zeros_like(metric)
    for start in range(0, len(scale), tile):
        here, later = slice(start, start + tile), slice(start + tile, None)
        own = lower[here, here]
        weight[here] = own.square().sum(1).float()
        if start + tile < len(scale):
            feedback[later, here] = torch.linalg.solve_triangular(
                own, lower[later, here], upper=False, left=False
            ).float()
    return OutputFactor(bounded_weight(weight), feedback)


def bounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """Clamp weights so that no position of a sequence counts a thousandth or a thousand times the
    mean."""
    mean = weight.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return torch.ones_like(weight)
    return weight.clamp(mean / IMPORTANCE_RANGE, mean * IMPORTANCE_RANGE)


def refit_scale(
    labels: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Least-squares scale of each output given its labels: ``(q^T H w) / (q^T H q)``, rounded to
    bfloat16.

    Args:
        labels, rows: float32 ``[K, N]``.
        hessian: ``[K, K]``, of the same inputs in the same order.
        scale: ``[N]``, kept where the fit is not positive.

    Returns:
        The scale ``[N]`` and the relative error that it leaves, ``tr(E H E^T) / tr(W H W^T)``; 0
        for a zero matrix.
    """
    refitted = torch.empty_like(scale)
    loss = energy = 0.0
    # By columns: products with the Hessian are as large as the matrix.
    for start in range(0, rows.shape[1], ROW_BLOCK):
        part = slice(start, start + ROW_BLOCK)
        q, w = labels[:, part], rows[:, part]
        of_q, of_w = hessian @ q, hessian @ w
        qq, qw, ww = (_inner(*pair) for pair in ((of_q, q), (of_q, w), (of_w, w)))
        fitted = (qw / qq).float()
        usable = torch.isfinite(fitted) & (fitted > 0)
        refitted[part] = torch.where(usable, fitted, scale[part]).bfloat16().float()
        # The quadratic form of w - s q from its parts: a third product would take as long as both.
        s = refitted[part].double()
        loss += float((ww - 2 * s * qw + s * s * qq).sum())
        energy += float(ww.sum())
    return refitted, max(loss, 0.0) / energy if energy > 0 else 0.0


def refit_scales_together(
    labels: torch.Tensor,
    rows: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    metric: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """`refit_scale` where errors of outputs make up for each other: the minimum of
    ``tr(G E H E^T)`` over all scales, and the relative error in this metric ``[N, N]``; by
    `refit_scale` where that has no minimum."""
    of_labels = hessian @ labels
    quadratic = symmetric_product(labels, of_labels).double().mul_(metric)
    linear = (of_labels.T @ rows).double().mul_(metric).sum(1)
    total = symmetric_product(rows, hessian @ rows).mul_(metric)
    energy = float(total.sum(dtype=torch.float64))
    del total
    # One output whose labels are all zero would make it singular.
    quadratic.diagonal().add_(1e-6 * quadratic.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(quadratic)
    if int(info) or not energy > 0:
        return refit_scale(labels, rows, hessian, scale)
    fitted = torch.cholesky_solve(linear[:, None], lower)[:, 0].float()
    usable = torch.isfinite(fitted) & (fitted > 0)
    refitted = torch.where(usable, fitted, scale).bfloat16().float()
    s = refitted.double()
    loss = energy - 2 * float(linear @ s) + float(s @ (quadratic @ s))
    return refitted, max(loss, 0.0) / energy


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products of the columns of ``[K, n]`` matrices, float64 ``[n]``."""
    return (a * b).sum(0, dtype=torch.float64)
