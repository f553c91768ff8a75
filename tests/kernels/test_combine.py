"""The weighted sum over experts."""

import pytest
import torch

from erniequant.packing.decoding import encode_scale
from erniequant_kernels.combine import combine, combine_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("splits, dtype", [(1, torch.bfloat16), (4, torch.float32)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_to_the_reference(splits, dtype, out_dtype):
    # 600 outputs: a full block and a part. Slots without an expert hold NaN in memory.
    index = torch.tensor([[0, 2], [2, 2], [1, 3], [-1, 3]], device=DEVICE)
    partial = torch.randn(splits, 8, 600, device=DEVICE).to(dtype)
    partial[:, ((index < 0) | (index >= 3)).flatten()] = torch.nan
    scale = encode_scale(torch.rand(3, 600)).to(DEVICE)
    routing = torch.rand(4, 2, device=DEVICE)
    out = torch.full((4, 600), torch.nan, dtype=out_dtype, device=DEVICE)
    combine(partial, scale, index, routing, out)
    expected = combine_reference(partial, scale, index, routing)
    assert torch.equal(expected[3], torch.zeros(600, device=DEVICE))
    torch.testing.assert_close(out.float(), expected.to(out_dtype).float(), rtol=2**-8, atol=1e-6)
