"""The weighted sum over experts."""

import pytest
import torch

from erniequant.packing.decoding import encode_scale
from erniequant_kernels.combine import combine, combine_reference

NAN = 0x7FC0  # as a bfloat16 pattern
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# A product of bfloat16 results carries its scales; the summands of one are float32 and do not.
@pytest.mark.parametrize(
    "splits, dtype, scaled",
    [(1, torch.bfloat16, True), (1, torch.bfloat16, False), (1, torch.float32, False),
     (2, torch.float32, False), (5, torch.float32, False)],
)  # fmt: skip
@pytest.mark.parametrize("outputs", [600, 512])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_to_the_reference(splits, dtype, scaled, outputs, out_dtype):
    # 600 outputs: a full block and a part. Slots without an expert hold NaN in memory, routing
    # weights too, and so do the scales where no scale may be read.
    index = torch.tensor([[0, 2], [2, 2], [1, 3], [-1, 3]], device=DEVICE)
    nobody = (index < 0) | (index >= 3)
    partial = torch.randn(splits, 8, outputs, device=DEVICE).to(dtype)
    partial[:, nobody.flatten()] = torch.nan
    scale = encode_scale(torch.rand(3, outputs) * torch.tensor([[0.1], [1], [-7]])).to(DEVICE)
    if scaled:
        scale.fill_(NAN)
    routing = torch.rand(4, 2, device=DEVICE)
    routing[nobody] = torch.nan
    out = torch.full((4, outputs), torch.nan, dtype=out_dtype, device=DEVICE)
    combine(partial, scale, index, routing, out, scaled=scaled)
    expected = combine_reference(partial, scale, index, routing, scaled)
    assert torch.equal(expected[3], torch.zeros(outputs, device=DEVICE))
    torch.testing.assert_close(out.float(), expected.to(out_dtype).float(), rtol=2**-8, atol=1e-6)


def test_neither_scales_nor_weights_are_left_out():
    # Numbers that bfloat16 holds, so that the sum can be written down.
    partial = torch.tensor([[[2.0, 4.0], [8.0, 16.0]]], device=DEVICE)
    scale = encode_scale(torch.tensor([[0.5, 1.0], [0.25, 2.0]])).to(DEVICE)
    index = torch.tensor([[1, 0]], device=DEVICE)
    routing = torch.tensor([[3.0, 5.0]], device=DEVICE)
    out = torch.empty(1, 2, device=DEVICE)
    combine(partial, scale, index, routing, out)
    assert out.tolist() == [[2 * 0.25 * 3 + 8 * 0.5 * 5, 4 * 2.0 * 3 + 16 * 1.0 * 5]]
    combine(partial, scale, index, routing, out, scaled=True)
    assert out.tolist() == [[2 * 3 + 8 * 5, 4 * 3 + 16 * 5]]
