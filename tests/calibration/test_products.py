"""Products against float64, and symmetric ones against whole ones."""

import pytest
import torch

from erniequant import system
from erniequant.encoding.products import MOMENT_BLOCK, add_moments, mirror, product


@pytest.mark.parametrize(("fast", "bound"), [(False, 1e-6), (True, 2**-8)])
def test_a_product_is_as_exact_as_its_type(
    monkeypatch: pytest.MonkeyPatch, fast: bool, bound: float
) -> None:
    """Rounding of factors and of the result is below 3 halves of 2^-8 in all; only the last is not
    averaged over the 700 summands, and it is half of that."""
    monkeypatch.setattr(system, "fast_bfloat16", lambda: fast)
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(33, 700, generator=generator), torch.randn(700, 65, generator=generator)
    found, exact = product(a, b), a.double() @ b.double()
    assert found.dtype == torch.float32
    size = a.double().square().sum(1).sqrt()[:, None] * b.double().square().sum(0).sqrt()
    assert float(((found - exact).abs() / size).max()) < bound
    # One that was converted before gives the same.
    dtype = system.product_dtype(a.device)
    assert dtype == (torch.bfloat16 if fast else torch.float32)
    assert torch.equal(product(a.to(dtype), b.to(dtype)), found)


# More columns than one block, and not a multiple of it; less than one.
@pytest.mark.parametrize("inputs", [2 * MOMENT_BLOCK + 37, 19])
def test_half_of_a_symmetric_product_is_enough(inputs: int) -> None:
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(inputs, inputs)
    expected = torch.zeros(inputs, inputs, dtype=torch.float64)
    for count in (5, 3):
        x = torch.randn(count, inputs, generator=generator)
        weights = torch.rand(count, 1, generator=generator)
        add_moments(total, x, x * weights)
        expected += (x * weights).double().T @ x.double()
    mirror(total)
    assert torch.equal(total, total.T)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
