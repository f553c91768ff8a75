"""What matrices aim at and which tokens matter, by definition."""

import torch
from torch.nn.functional import silu

from erniequant.encoding.hessian import ROW_BLOCK
from erniequant.encoding.targets import (
    CORRECTION_RIDGE,
    corrected_target,
    inner_slopes,
    token_emphasis,
)


def test_slopes_are_those_of_autograd() -> None:
    # Seven tokens and five inner channels: neither fills a vector. Gates far out and at zero too.
    gate_and_up = 3 * torch.randn(7, 10, generator=torch.Generator().manual_seed(4))
    gate_and_up[0, :3] = torch.tensor([0.0, 40.0, -40.0])
    inner = gate_and_up.clone().requires_grad_()
    gate, up = inner.chunk(2, dim=-1)
    (expected,) = torch.autograd.grad((silu(gate) * up).sum(), inner)
    torch.testing.assert_close(inner_slopes(gate_and_up), expected, rtol=1e-5, atol=1e-6)


def test_emphasis_follows_the_root_of_sensitivity() -> None:
    found = token_emphasis(torch.tensor([1.0, 4.0, 0.0]), torch.tensor([1.0, 1.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 0.0]))
    overflown = torch.tensor([1.0, float("inf")])
    assert token_emphasis(overflown, torch.ones(2)).tolist() == [1.0, 0.0]
    assert token_emphasis(torch.zeros(0), torch.zeros(0)).numel() == 0


def test_corrected_target_is_the_ridge_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    # More outputs than one block, and not a whole number of blocks.
    outputs = ROW_BLOCK + 6
    weight = torch.randn(outputs, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    lacking = 0.3 * torch.randn(30, outputs, generator=generator, dtype=torch.float64)
    counts = torch.rand(30, 1, generator=generator, dtype=torch.float64)
    hessian = (counts * x).T @ x
    moments = ((counts * x).T @ lacking).float()
    found = corrected_target(weight.float(), hessian.float(), lambda rows: moments[:, rows])
    # min |sqrt(c) (x V^T - x W^T - r)|^2 + ridge |V - W|^2, solved by stacking.
    ridge = CORRECTION_RIDGE * float(hessian.diagonal().mean())
    left = torch.cat([counts.sqrt() * x, ridge**0.5 * torch.eye(4, dtype=torch.float64)])
    right = torch.cat([counts.sqrt() * (x @ weight.T + lacking), ridge**0.5 * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_unusable_moments_leave_the_weight_as_it_is() -> None:
    weight = torch.randn(3, 2)
    bad = torch.tensor([[1.0, 0.0], [float("nan"), 1.0]])

    def target(hessian: torch.Tensor, missing: float) -> torch.Tensor:
        return corrected_target(weight, hessian, lambda rows: torch.full((2, 3), missing))

    assert torch.equal(target(torch.zeros(2, 2), 1.0), weight)
    assert torch.equal(target(bad, 1.0), weight)
    assert torch.equal(target(torch.eye(2), float("inf")), weight)
