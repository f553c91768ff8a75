"""Products of few tokens with bfloat16 matrices, against float32."""

import pytest
import torch

from erniequant_kernels.cpu.dense import ITEM_ROWS, linear, linear_reference, takes_linear
from tests.kernels.cpu.test_product import HERE, MACHINES


# Outputs: one group of four rows; one row of groups more than an item.
@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("outputs", [4, ITEM_ROWS + 4, 3 * ITEM_ROWS])
@pytest.mark.parametrize("inputs", [32, 96, 2560])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_against_float32(outputs, inputs, tokens, on):
    x, weight = torch.randn(1, tokens, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    assert takes_linear(x, weight, on)
    found, expected = linear(x, weight, on), linear_reference(x, weight)
    assert found.shape == expected.shape and found.dtype == torch.bfloat16
    # One unit in the last place, where sums in another order round the other way.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2e-3)


def test_what_is_left_to_torch():
    weight = torch.randn(8, 64).bfloat16()
    taken = [
        (torch.randn(5, 64).bfloat16(), weight),
        (torch.randn(0, 64).bfloat16(), weight),
        (torch.randn(1, 64), weight),
        (torch.randn(1, 64).bfloat16(), weight.float()),
        (torch.randn(1, 64).bfloat16(), torch.randn(6, 64).bfloat16()),
        (torch.randn(1, 40).bfloat16(), torch.randn(8, 40).bfloat16()),
        (torch.randn(1, 8).bfloat16(), weight.T),
    ]
    assert not any(takes_linear(x, w, HERE) for x, w in taken)


def test_threads_do_not_change_a_bit():
    x, weight = torch.randn(2, 128).bfloat16(), torch.randn(500, 128).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_is_no_number_stays_so():
    x, weight = torch.zeros(1, 64).bfloat16(), torch.ones(8, 64).bfloat16()
    x[0, 3] = torch.inf
    assert linear(x, weight).isinf().all()
    weight[2, 5] = torch.nan
    assert linear(x, weight)[0].isnan().tolist() == [row == 2 for row in range(8)]
