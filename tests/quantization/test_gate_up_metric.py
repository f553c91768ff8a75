"""How errors of the outputs of gate and up count, against the Jacobian of an expert that autograd
finds."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear, silu

from erniequant.calibration.rows import RowPool
from erniequant.encoding.hessian import Moments
from erniequant.quantization import expert as expert_module
from erniequant.quantization.expert import ExpertWeights, LayerContext, quantize_expert
from erniequant.quantization.token_batches import TokenBatch
from tests.quantization.conftest import HIDDEN, INNER, evidence

pytestmark = pytest.mark.usefixtures("float32_products")

NOTHING = evidence(torch.zeros(0, HIDDEN), torch.zeros(0))


def jacobians(weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """Of the expert's output with respect to the outputs of gate and up, float64 ``[n, H, 2I]``."""
    down = weights.down().double()

    def output(inner: torch.Tensor) -> torch.Tensor:
        gate, up = inner.chunk(2)
        return linear(silu(gate) * up, down)

    inner = linear(x, weights.gate_up()).double()
    return torch.stack([torch.autograd.functional.jacobian(output, token) for token in inner])


def moments_of(
    weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> tuple[Moments, torch.Tensor]:
    """Moments of the inputs, and of the slopes, for these tokens alone."""
    given = expert_module._WithSample(tokens, NOTHING, 0.0)
    before = RowPool().empty(given.count, INNER)
    reach = weights.down().square().sum(0)
    return expert_module._gate_up_moments(weights.gate_up(), reach, given, before, layer)


def random_metric(size: int) -> torch.Tensor:
    """Second moments of fewer gradients than channels: singular, with strong correlations."""
    rows = torch.randn(size // 2, size, generator=torch.Generator().manual_seed(5))
    return rows.T @ rows


@pytest.mark.parametrize("by_gradient", [False, True])
def test_the_metric_is_the_mean_of_squared_jacobians(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext, by_gradient: bool
) -> None:
    few = tokens.rows(torch.arange(37))
    gradient = random_metric(HIDDEN) if by_gradient else None
    found = expert_module._gate_up_metric(
        expert_weights.down(), moments_of(expert_weights, few, layer)[1], gradient
    )
    outputs = torch.eye(HIDDEN) if gradient is None else gradient
    found_by_autograd = jacobians(expert_weights, few.original)
    expected = torch.einsum(
        "t,tha,hk,tkb->ab",
        few.weights.double(), found_by_autograd, outputs.double(), found_by_autograd,
    )  # fmt: skip
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * scale)


def test_emphasis_of_a_token_is_the_norm_of_its_jacobian(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    few = tokens.rows(torch.arange(37))
    moments, _ = moments_of(expert_weights, few, layer)
    counts = few.weights * jacobians(expert_weights, few.original).flatten(1).norm(dim=1)
    # Their sum is that of the weights.
    counts = counts * few.weights.sum() / counts.sum()
    x = few.x.double()
    torch.testing.assert_close(moments.total.double(), (x * counts[:, None]).T @ x, rtol=1e-3,
                               atol=1e-4)  # fmt: skip
    assert moments.weight == pytest.approx(float(few.weights.sum()), rel=1e-5)


def test_of_many_tokens_some_make_the_metric(
    expert_weights: ExpertWeights,
    tokens: TokenBatch,
    layer: LayerContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 500 tokens for 120: every fourth.
    with monkeypatch.context() as patch:
        patch.setattr(expert_module, "METRIC_TOKENS", 120)
        moments, slopes = moments_of(expert_weights, tokens, layer)
    some = tokens.rows(torch.arange(0, 500, 4))
    torch.testing.assert_close(slopes, moments_of(expert_weights, some, layer)[1])
    # All of them make the Hessian.
    torch.testing.assert_close(moments.total, moments_of(expert_weights, tokens, layer)[0].total)


def test_without_tokens_all_slopes_are_alike(
    expert_weights: ExpertWeights, layer: LayerContext
) -> None:
    _, slopes = moments_of(expert_weights, NOTHING, layer)
    metric = expert_module._gate_up_metric(expert_weights.down(), slopes, None)
    reach = expert_weights.down().square().sum(0)
    torch.testing.assert_close(metric, torch.diag(reach.repeat(2)))


def test_slopes_that_overflow_leave_the_diagonal(expert_weights: ExpertWeights) -> None:
    slopes = torch.eye(2 * INNER)
    slopes[3, 5] = float("nan")
    slopes[7, 7] = float("inf")
    found = expert_module._gate_up_metric(expert_weights.down(), slopes, None)
    expected = expert_weights.down().square().sum(0).repeat(2)
    expected[7] = 0
    torch.testing.assert_close(found, expected)


def test_the_metric_and_the_gradients_lower_the_loss_that_they_stand_for(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    # Three directions of the output carry most of the loss.
    gradient = torch.eye(HIDDEN)
    strong = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(6))
    gradient += 5 * strong.T @ strong

    def output(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = linear(tokens.x, gate_up).chunk(2, dim=-1)
        return linear(silu(gate) * up, down)

    def loss(layer: LayerContext) -> float:
        found = quantize_expert(expert_weights, tokens, layer, RowPool())
        missed = output(found.gate_up.effective, found.down.effective)
        missed -= output(expert_weights.gate_up(), expert_weights.down())
        return float(torch.einsum("t,th,hk,tk->", tokens.weights, missed, gradient, missed))

    assert loss(replace(layer, gradient=gradient)) < 0.8 * loss(layer)
