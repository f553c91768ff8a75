"""What matrices aim at and which outputs matter, by definition."""

import torch
from torch.nn.functional import linear, silu

from erniequant.quantization.expert import Evidence, ExpertWeights
from erniequant.quantization.targets import (
    CORRECTION_RIDGE,
    corrected_target,
    inner_sensitivity,
    output_importance,
    token_emphasis,
)


def test_sensitivity_is_the_diagonal_of_the_squared_jacobian(
    expert_weights: ExpertWeights, tokens: Evidence
) -> None:
    few = tokens.rows(torch.arange(7))

    def of_inner(inner: torch.Tensor) -> torch.Tensor:
        gate, up = inner.chunk(2)
        return linear(silu(gate) * up, expert_weights.down)

    expected = []
    for x in few.x:
        inner = torch.cat([linear(x, expert_weights.gate), linear(x, expert_weights.up)])
        jacobian = torch.autograd.functional.jacobian(of_inner, inner)
        expected.append(jacobian.square().sum(0))
    gate_and_up = linear(few.x, torch.cat([expert_weights.gate, expert_weights.up]))
    found = inner_sensitivity(gate_and_up, expert_weights.down)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-6)


def test_importance_sums_over_tokens_and_falls_back_to_the_columns_of_down() -> None:
    down = torch.tensor([[1.0, 2.0], [0.0, 2.0]])
    sensitivity, weights = torch.rand(3, 4), torch.tensor([1.0, 0.0, 2.0])
    found = output_importance(sensitivity, weights, down)
    torch.testing.assert_close(found, sensitivity[0] + 2 * sensitivity[2])
    unseen = output_importance(torch.zeros(0, 4), torch.zeros(0), down)
    assert unseen.tolist() == [1.0, 8.0, 1.0, 8.0]


def test_emphasis_follows_the_root_of_sensitivity_and_keeps_the_sum() -> None:
    sensitivity = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 0.0]])
    found = token_emphasis(sensitivity, torch.tensor([1.0, 1.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor([2.0, 4.0, 0.0]))
    weights = torch.tensor([1.0, 2.0])
    for useless in (torch.zeros(2, 2), torch.full((2, 2), float("inf"))):
        assert torch.equal(token_emphasis(useless, weights), weights)
    assert token_emphasis(torch.zeros(0, 2), torch.zeros(0)).numel() == 0


def test_corrected_target_is_the_ridge_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    lacking = 0.3 * torch.randn(30, 6, generator=generator, dtype=torch.float64)
    counts = torch.rand(30, 1, generator=generator, dtype=torch.float64)
    hessian = (counts * x).T @ x
    found = corrected_target(weight.float(), hessian.float(), ((counts * x).T @ lacking).float())
    # min |sqrt(c) (x V^T - x W^T - r)|^2 + ridge |V - W|^2, solved by stacking.
    ridge = CORRECTION_RIDGE * float(hessian.diagonal().mean())
    left = torch.cat([counts.sqrt() * x, ridge**0.5 * torch.eye(4, dtype=torch.float64)])
    right = torch.cat([counts.sqrt() * (x @ weight.T + lacking), ridge**0.5 * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_unusable_moments_leave_the_weight_as_it_is() -> None:
    weight = torch.randn(3, 2)
    bad = torch.tensor([[1.0, 0.0], [float("nan"), 1.0]])
    assert torch.equal(corrected_target(weight, torch.zeros(2, 2), torch.ones(2, 3)), weight)
    assert torch.equal(corrected_target(weight, bad, torch.ones(2, 3)), weight)
    huge = torch.full((2, 3), float("inf"))
    assert torch.equal(corrected_target(weight, torch.eye(2), huge), weight)
