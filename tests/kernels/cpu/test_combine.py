"""The weighted sum of rows on the CPU against plain torch."""

import pytest
import torch

from erniequant_kernels.cpu.combine import combine, combine_reference
from erniequant_kernels.cpu.machine import machine


# 2560: the 21B; 40 and 7 leave vectors of eight lanes and of one.
@pytest.mark.parametrize("width", [2560, 40, 7])
def test_rows_are_added_in_order(width):
    # Token 1 has no row, token 0 three, the last row is huge.
    token = torch.tensor([0, 2, 0, 3, 0])
    rows, weights = torch.randn(5, width), torch.rand(5)
    rows[4] *= 1e6
    out = torch.zeros(4, width)
    combine(width, machine())(5, *(t.data_ptr() for t in (rows, weights, token, out)))
    expected = combine_reference(rows, weights, token, 4)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert not out[1].any()
