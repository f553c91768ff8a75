"""Linear layers on stored weights against torch's own in float32."""

import copy

import pytest
import torch
from torch import nn

from erniequant.models import linear
from erniequant.models.linear import StoredLinear, store_linears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [1, 7 * 5, 7 * 6, 10**6])
def test_blocks_of_rows_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, block: int, bias: bool
) -> None:
    # 11 rows of 7: blocks of one row, of five and six (with a rest), and all at once.
    monkeypatch.setattr(linear, "BLOCK", block)
    stock = nn.Linear(7, 11, bias=bias).to(torch.bfloat16)
    stored = StoredLinear(copy.deepcopy(stock))
    x = torch.randn(2, 3, 7)
    expected = stock.float()(x)
    torch.testing.assert_close(stored(x), expected, rtol=1e-6, atol=1e-6)
    assert stored(x).dtype == torch.float32


def test_every_linear_layer_is_replaced_and_keeps_its_name() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))
    names = list(module.state_dict())
    expected = module(torch.ones(1, 4))
    store_linears(module)
    assert not any(isinstance(child, nn.Linear) for child in module.modules())
    assert list(module.state_dict()) == names
    torch.testing.assert_close(module(torch.ones(1, 4)), expected)
