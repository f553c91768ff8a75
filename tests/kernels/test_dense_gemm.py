"""The bfloat16 product over experts, whole and in chunks."""

import pytest
import torch

from erniequant_kernels.dense_gemm import DenseGemmConfig, dense_gemm, dense_gemm_reference
from erniequant_kernels.routing import row_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("programs", [1, 7])
def test_equal_to_the_reference(dtype, chunk, programs):
    # 80 inputs and 72 outputs fill no tile; expert 1 has no tokens, expert 3 more than two tiles.
    experts, outputs, inputs, top_k = 5, 72, 80, 2
    index = torch.tensor([[3, 0], [3, 3], [2, 4], [3, 5], [0, 3]] + [[3, 4]] * 34).to(DEVICE)
    x = torch.randn(len(index), inputs, device=DEVICE).bfloat16()
    weights = torch.randn(experts, outputs, inputs, device=DEVICE).bfloat16()
    config = DenseGemmConfig(16, 32, 32, 4, 2, programs)
    tiles = row_tiles(index, experts, config.block_m)
    out = torch.full((index.numel(), outputs), torch.nan, dtype=dtype, device=DEVICE)
    for first in range(0, experts, chunk):
        dense_gemm(x, weights[first : first + chunk], tiles, top_k, out, config, first)
    expected = dense_gemm_reference(x, weights, index.flatten(), top_k)
    routed = index.flatten() < experts
    assert out[~routed].isnan().all()
    atol = (1e-5 if dtype == torch.float32 else 2**-8) * expected.abs().max().item()
    torch.testing.assert_close(out[routed].float(), expected[routed], rtol=0, atol=atol)
