"""One launch for two things: each must be what it is alone."""

import pytest
import torch

from erniequant.packing.rotation import pack_signs, random_signs
from erniequant_kernels.prepare import prepare
from erniequant_kernels.rotation import rotate_reference
from erniequant_kernels.routing import row_tiles_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tokens", [1, 9])
def test_both_parts(tokens):
    # 7 experts and 96 channels: neither number of programs is round.
    experts, inputs, block = 7, 96, 32
    index = torch.stack([torch.randperm(experts)[:3] for _ in range(tokens)]).to(DEVICE)
    x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
    signs = pack_signs(random_signs(inputs, torch.Generator().manual_seed(3))).to(DEVICE)
    out = torch.full((tokens, inputs), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    tiles = prepare(index, experts, 8, x, signs, block, out)
    assert torch.equal(out, rotate_reference(x, signs, block))
    expected = row_tiles_reference(index.cpu(), experts, 8)
    assert tiles.order.tolist() == expected.order.tolist()
    assert tiles.expert.tolist() == expected.expert.tolist()
    assert tiles.starts.tolist() == expected.starts.tolist()
