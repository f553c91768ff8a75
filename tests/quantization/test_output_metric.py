"""A matrix under a metric of its outputs: loss, scales and metrics that cannot be used."""

import pytest
import torch

from erniequant.codes import get_code
from erniequant.encoding.matrix import (
    QuantizedMatrix,
    Rotation,
    quantize_matrix,
    refit_scale,
    refit_scales_together,
)
from erniequant.packing.rotation import random_signs
from tests.quantization.test_feedback import OUTPUTS, TILE, moments

pytestmark = pytest.mark.usefixtures("float32_products")

INPUTS = 48


def loss(difference: torch.Tensor, hessian: torch.Tensor, metric: torch.Tensor) -> float:
    """``tr(G E H E^T)`` of an error ``[N, K]``."""
    error = difference.double()
    return float(torch.einsum("mn,ni,ij,mj->", metric.double(), error, hessian.double(), error))


def quantized(importance: torch.Tensor, hessian: torch.Tensor | None = None) -> QuantizedMatrix:
    """The same random matrix each time."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    rotation = Rotation(random_signs(INPUTS, generator), 16)
    hessian = torch.eye(INPUTS) if hessian is None else hessian.clone()
    return quantize_matrix(weight, hessian, importance, rotation, get_code("cc2", 8), TILE)


def source() -> torch.Tensor:
    """That matrix."""
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))


def test_outputs_make_up_for_each_other() -> None:
    # Six directions carry nearly all of the loss, spread over all outputs and so over all tiles.
    strong = torch.randn(6, OUTPUTS, generator=torch.Generator().manual_seed(2))
    metric, hessian = strong.T @ strong + 0.1 * torch.eye(OUTPUTS), moments(INPUTS, seed=3)
    found = quantized(metric, hessian)
    own = quantized(metric.diagonal().clone(), hessian)
    after = loss(found.effective - source(), hessian, metric)
    assert after < 0.5 * loss(own.effective - source(), hessian, metric)
    assert found.error == pytest.approx(after / loss(source(), hessian, metric), rel=1e-3)


def noisy_labels(rows: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return rows + 0.4 * torch.randn(rows.shape, generator=generator)


def test_scales_of_all_outputs_are_the_least_squares_solution() -> None:
    # 7 outputs of 20 inputs, few enough for the whole linear problem.
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(5))
    labels, hessian, metric = noisy_labels(rows), moments(20, seed=6), moments(7, seed=7)
    scale, error = refit_scales_together(labels, rows, hessian, torch.ones(7), metric)
    # |A^T (W - Q diag(s)) B|^2 with H = A A^T and G = B B^T, linear in s.
    a, b = (torch.linalg.cholesky(matrix.double()) for matrix in (hessian, metric))
    columns = [torch.outer(a.T @ labels[:, n].double(), b[n]).flatten() for n in range(7)]
    right = (a.T @ rows.double() @ b).flatten()
    best = torch.linalg.lstsq(torch.stack(columns, 1), right[:, None]).solution[:, 0]
    # bfloat16 rounds by up to 2^-9; solving output by output would be several percent off.
    torch.testing.assert_close(scale.double(), best, rtol=2**-8, atol=0)
    alone, _ = refit_scale(labels, rows, hessian, torch.ones(7))
    assert ((alone - scale).abs() / scale).max() > 0.05
    left = loss((rows - labels * scale).T, hessian, metric) / loss(rows.T, hessian, metric)
    assert error == pytest.approx(left, rel=1e-4)


def test_with_a_diagonal_metric_each_scale_is_fitted_alone() -> None:
    rows = torch.randn(40, 9, generator=torch.Generator().manual_seed(8))
    labels, hessian, start = noisy_labels(rows), moments(40, seed=9), torch.full((9,), 0.5)
    # Nothing can be fitted to an output without labels: it keeps its scale.
    labels[:, 4] = 0
    alone, error = refit_scale(labels, rows, hessian, start)
    uneven = torch.diag(torch.rand(9, generator=torch.Generator().manual_seed(10)) + 0.1)
    together, _ = refit_scales_together(labels, rows, hessian, start, uneven)
    torch.testing.assert_close(together, alone, rtol=2**-7, atol=0)
    assert together[4] == 0.5
    _, same = refit_scales_together(labels, rows, hessian, start, torch.eye(9))
    assert same == pytest.approx(error, rel=1e-4)


def unusable(case: str) -> torch.Tensor:
    metric = moments(OUTPUTS, seed=11)
    if case == "indefinite":
        metric[:, 0] *= 3
        metric[0] *= 3
        metric[0, 0] /= 9
    elif case == "negative":
        metric = -metric
    elif case == "zero":
        metric.zero_()
    elif case == "bad diagonal":
        metric[3, 3] = float("nan")
    else:
        metric[5, 70] = metric[70, 5] = float(case)
    return metric


@pytest.mark.parametrize("case", ["indefinite", "negative", "zero", "nan", "inf", "bad diagonal"])
def test_of_a_metric_that_cannot_be_factored_the_diagonal_counts(case: str) -> None:
    metric = unusable(case)
    found, plain = quantized(metric), quantized(metric.diagonal().clone())
    assert torch.equal(found.parts["packed"], plain.parts["packed"])
    error = (found.effective - source()).square().sum() / source().square().sum()
    assert float(error) < 0.2


def test_outputs_that_count_nothing_stay_sound() -> None:
    # A whole tile and one output of another, as channels that no token opens.
    metric = moments(OUTPUTS, seed=12)
    for dead in (slice(32, 64), slice(70, 71)):
        metric[dead] = 0
        metric[:, dead] = 0
    found = quantized(metric)
    error = (found.effective - source()).square().mean(1) / source().square().mean(1)
    assert float(error[32:64].mean()) < 0.2
    assert torch.isfinite(found.effective).all()
