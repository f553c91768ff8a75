"""Input moments and their factorisation: closed forms, and every way in which data can be bad."""

import pytest
import torch

from erniequant.encoding.hessian import ROW_BLOCK, Moments, all_finite, factorise

pytestmark = pytest.mark.usefixtures("float32_products")


def moments_of(total: torch.Tensor, weight: float) -> Moments:
    found = Moments(total.shape[0])
    found.total, found.weight = total, weight
    return found


def test_moments_are_weighted_sums_of_outer_products() -> None:
    # Two chunks, the second of a single row.
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    weights = torch.rand(9, dtype=torch.float64)
    found = Moments(5, (3,))
    for part in (slice(0, 8), slice(8, 9)):
        found.add(x[part].float(), weights[part].float(), y[part].float())
    found.finish()
    expected = torch.einsum("t,ti,tj->ij", weights, x, x)
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-4, atol=1e-4)
    crossed = torch.einsum("t,ti,tj->ij", weights, x, y)
    torch.testing.assert_close(found.cross[0].double(), crossed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weight, float(weights.sum()), rtol=1e-6, atol=0)


def test_an_expert_without_tokens_gets_the_prior() -> None:
    prior = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(Moments(3).blend(prior, 7.0), prior)


def test_without_tokens_and_prior_it_is_the_identity() -> None:
    assert torch.equal(Moments(3).blend(torch.zeros(3, 3), 0.0), torch.eye(3))
    assert torch.equal(Moments(3).blend(torch.full((3, 3), float("nan")), 1.0), torch.eye(3))


def test_blending_weighs_by_tokens() -> None:
    own = moments_of(30 * torch.eye(2), weight=10.0)
    torch.testing.assert_close(own.blend(torch.eye(2), 10.0), 2 * torch.eye(2))


def test_one_bad_number_anywhere_is_found() -> None:
    matrix = torch.zeros(2 * ROW_BLOCK + 1, 3)
    assert all_finite(matrix)
    for row in (0, ROW_BLOCK, 2 * ROW_BLOCK):
        for bad in (float("nan"), float("inf"), float("-inf")):
            damaged = matrix.clone()
            damaged[row, 2] = bad
            assert not all_finite(damaged)


def test_factor_rebuilds_the_damped_hessian() -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    hessian = (x.T @ x / 50).float()
    factor = factorise(hessian)
    assert (factor.damping, factor.fallback) == (0.01, None)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(8)
    unit = factor.feedback.double()
    assert torch.equal(unit.diagonal(), torch.ones(8, dtype=torch.float64))
    assert torch.equal(unit, unit.tril())
    inverse = torch.linalg.inv(unit)
    diagonal = inverse @ damped @ inverse.T
    assert (diagonal - diagonal.diagonal().diag()).abs().max() < 1e-5


def test_a_rank_deficient_hessian_needs_no_more_damping() -> None:
    x = torch.randn(2, 40)
    assert factorise(x.T @ x).damping == 0.01


def test_an_indefinite_matrix_is_damped_until_it_is_not() -> None:
    # Smallest eigenvalue -0.2, mean diagonal 0.8: 0.1 of the mean is too little, 0.3 is enough.
    hessian = torch.diag(torch.tensor([1.8, -0.2, 0.8]))
    assert factorise(hessian).damping == 0.3


def test_nothing_usable_means_no_feedback_and_a_reason() -> None:
    for bad in (torch.zeros(3, 3), torch.full((3, 3), float("nan")), -torch.eye(3)):
        factor = factorise(bad)
        assert torch.equal(factor.feedback, torch.eye(3))
        assert factor.fallback is not None
    hopeless = torch.diag(torch.tensor([100.0, -99.0, 0.5]))
    assert factorise(hopeless).fallback == "no damping made the Hessian positive definite"
