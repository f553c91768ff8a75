"""Elements beyond 2^31: the buffers are 9 GB each, of which a few pages are ever touched."""

import pytest
import torch

from erniequant.codes import get_code
from erniequant.packing.decoding import encode_scale
from erniequant_kernels import decode
from erniequant_kernels.dense_gemm import DenseGemmConfig, dense_gemm
from erniequant_kernels.fused_gemm import FusedGemmConfig, fused_gemm, fused_gemm_reference
from erniequant_kernels.packed_gemm import PackedGemmConfig, packed_gemm, packed_gemm_reference
from erniequant_kernels.routing import RowTiles
from tests.kernels.products import random_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = 36_000_000  # times 64 elements a row: 2.3e9


def one_row_tile(assignment, expert, block_m):
    """A single assignment, far behind the start of every buffer it indexes."""

    def number(value):
        return torch.tensor([value], dtype=torch.int32, device=DEVICE)

    starts = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    return RowTiles(number(assignment), number(expert), number(0), number(1), starts, block_m)


def huge(*shape, dtype):
    elements = torch.Size(shape).numel()
    assert elements > 2**31
    try:
        return torch.empty(shape, dtype=dtype, device=DEVICE)
    except torch.OutOfMemoryError:  # a small card; without one, address space is never short
        pytest.skip(f"the card has no {elements * dtype.itemsize / 1e9:.0f} GB to spare")


def test_packed_product_of_a_row_far_behind():
    code, tile = get_code("cc4", 12), 32
    x = huge(LAST + 1, 64, dtype=torch.bfloat16)
    out = huge(1, LAST + 1, 64, dtype=torch.float32)
    row = torch.randn(1, 64, device=DEVICE).bfloat16()
    x[LAST:] = row
    packed = random_words(1, 2, 64 * code.words_per_sequence(tile))
    packed_gemm(
        x, packed, decode.constants(DEVICE), code, tile, one_row_tile(LAST, 0, 8), 1, out,
        PackedGemmConfig(8, 32, 1, 1, 1),
    )  # fmt: skip
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    expected = packed_gemm_reference(row, packed, code, tile, index, 1)
    torch.testing.assert_close(out[0, LAST:], expected, rtol=1e-5, atol=1e-5)


def test_packed_product_with_an_expert_far_behind():
    code, tile, inputs, experts = get_code("cc2", 12), 32, 8192, 70_000
    packed = huge(experts, 2, inputs * code.words_per_sequence(tile), dtype=torch.int32)
    packed[-1] = random_words(*packed.shape[1:])
    x = torch.randn(1, inputs, device=DEVICE).bfloat16()
    out = torch.empty(1, 1, 64, device=DEVICE)
    packed_gemm(
        x, packed, decode.constants(DEVICE), code, tile,
        one_row_tile(0, experts - 1, 8), 1, out,
        # Few turns for the interpreter; a compiler would unroll so large a tile for ever.
        PackedGemmConfig(8, 64 if DEVICE == "cuda" else 1024, 1, 1, 1),
    )  # fmt: skip
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    expected = packed_gemm_reference(x, packed[-1:], code, tile, index, 1)
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-3)


def test_dense_product_of_a_row_far_behind():
    x = huge(LAST + 1, 64, dtype=torch.bfloat16)
    out = huge(LAST + 1, 64, dtype=torch.bfloat16)
    x[LAST:] = torch.randn(1, 64)
    weights = torch.randn(1, 64, 64, device=DEVICE).bfloat16()
    dense_gemm(x, weights, one_row_tile(LAST, 0, 16), 1, out, DenseGemmConfig(16, 64, 64, 4, 1, 1))
    expected = x[LAST:].float() @ weights[0].float().T
    torch.testing.assert_close(out[LAST:].float(), expected, rtol=2**-7, atol=0.05)


def test_fused_product_of_a_row_far_behind():
    code, tile = get_code("cc4", 12), 32
    x = huge(LAST + 1, 64, dtype=torch.bfloat16)
    out = huge(LAST + 1, 64, dtype=torch.bfloat16)
    x[LAST:] = torch.randn(1, 64)
    packed = random_words(1, 2, 64 * code.words_per_sequence(tile))
    scale = encode_scale(torch.rand(1, 64, 1) + 0.5).to(DEVICE)
    fused_gemm(
        x, packed, scale, decode.constants(DEVICE), code, tile, one_row_tile(LAST, 0, 16), 1, out,
        FusedGemmConfig(16, 64, 64, 4, 1),
    )  # fmt: skip
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    expected = fused_gemm_reference(x[LAST:], packed, scale, code, tile, index, 1)
    torch.testing.assert_close(out[LAST:].float(), expected, rtol=2**-7, atol=0.05)


def test_fused_product_with_an_expert_far_behind():
    code, tile, inputs, experts = get_code("cc2", 12), 32, 8192, 70_000
    packed = huge(experts, 2, inputs * code.words_per_sequence(tile), dtype=torch.int32)
    packed[-1] = random_words(*packed.shape[1:])
    x = torch.randn(1, inputs, device=DEVICE).bfloat16()
    out = torch.empty(1, 64, device=DEVICE)
    scale = encode_scale(torch.rand(experts, 64, 1) + 0.5).to(DEVICE)
    fused_gemm(
        x, packed, scale, decode.constants(DEVICE), code, tile, one_row_tile(0, experts - 1, 16), 1,
        out,
        # Few turns for the interpreter; a compiler would unroll so large a tile for ever.
        FusedGemmConfig(16, 64, 64 if DEVICE == "cuda" else 1024, 4, 1),
    )  # fmt: skip
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    expected = fused_gemm_reference(x, packed[-1:], scale[-1:], code, tile, index, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
