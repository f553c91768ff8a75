"""Rotation on the device: bit-equal to the format's."""

import pytest
import torch

from erniequant.packing.decoding import encode_scale
from erniequant.packing.rotation import pack_signs, random_signs
from erniequant_kernels.prepare import prepare
from erniequant_kernels.rotation import (
    rotate_reference,
    swiglu_rotate,
    swiglu_rotate_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 96 and 160 are no powers of two; 288 channels in blocks of 32 fill nine of a program's 32 rows.
SHAPES = [(96, 32), (160, 32), (512, 128), (96, 1), (288, 32), (2560, 128), (64, 64)]


def rotate(x, signs, block, out):
    one_expert = torch.zeros(len(x), 1, dtype=torch.int64, device=DEVICE)
    prepare(one_expert, 1, 8, x, signs, block, out)


def packed_signs(inputs):
    return pack_signs(random_signs(inputs, torch.Generator().manual_seed(3))).to(DEVICE)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128])
def test_every_block_size(block):
    # Three blocks to a row, and 13 or more rows: programs begin and end inside rows.
    inputs = 3 * block
    x = torch.randn(1500 // inputs + 13, inputs, device=DEVICE).bfloat16()
    signs = packed_signs(inputs)
    out = torch.full(x.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
    rotate(x, signs, block, out)
    assert torch.equal(out, rotate_reference(x, signs, block))


@pytest.mark.parametrize("inputs, block", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotation_is_equal_to_the_last_bit(inputs, block, dtype):
    x = torch.randn(5, inputs, device=DEVICE).to(dtype)
    signs = packed_signs(inputs)
    out = torch.full((5, inputs), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    rotate(x, signs, block, out)
    assert torch.equal(out, rotate_reference(x, signs, block))


def test_a_rotation_is_what_a_hadamard_matrix_does():
    # Independent of the butterflies: entry (i, j) of the matrix is the parity of i & j.
    signs = packed_signs(64)
    x = torch.randn(3, 64, device=DEVICE)
    index = torch.arange(64)
    parity = (index[:, None] & index[None, :]).apply_(lambda v: v.bit_count() & 1)
    matrix = (1 - 2 * parity.float()) / 8
    flips = torch.tensor([1.0 - 2 * (int(signs[c // 32]) >> c % 32 & 1) for c in range(64)])
    out = torch.empty(3, 64, dtype=torch.bfloat16, device=DEVICE)
    rotate(x, signs, 64, out)
    expected = (x.cpu() * flips) @ matrix
    torch.testing.assert_close(out.cpu().float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("inner, block", [(96, 32), (160, 32), (512, 128), (96, 1)])
@pytest.mark.parametrize(
    "splits, dtype, scaled",
    [(1, torch.bfloat16, True), (1, torch.bfloat16, False), (1, torch.float32, False),
     (3, torch.float32, False)],
)  # fmt: skip
def test_swiglu_then_rotation(inner, block, splits, dtype, scaled):
    experts, rows = 4, 7
    partial = torch.randn(splits, rows, 2 * inner, device=DEVICE).to(dtype)
    # Two rows belong to no expert; what they hold must not matter to the others.
    expert_index = torch.tensor([3, 0, 4, 1, -1, 2, 3], device=DEVICE)
    partial[:, 2] = torch.nan
    scale = encode_scale(torch.rand(experts, 2 * inner) * 2 + 0.1).to(DEVICE)
    if scaled:
        scale.fill_(0x7FC0)  # NaN: not to be read
    signs = packed_signs(inner)
    out = torch.empty(rows, inner, dtype=torch.bfloat16, device=DEVICE)
    swiglu_rotate(partial, scale, expert_index, signs, block, out, scaled=scaled)
    expected = swiglu_rotate_reference(partial, scale, expert_index, signs, block, scaled)
    routed = [0, 1, 3, 5, 6]
    out, expected = out[routed].float(), expected[routed].float()
    # exp differs in its last bits, so a value may round to the next bfloat16.
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-8 * expected.abs().max().item())


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_swiglu_does_not_overflow(value):
    partial = torch.full((1, 2, 64), value, device=DEVICE)
    partial[..., 32:] = 1
    scale = encode_scale(torch.ones(1, 64)).to(DEVICE)
    signs = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out = torch.empty(2, 32, dtype=torch.bfloat16, device=DEVICE)
    swiglu_rotate(partial, scale, torch.zeros(2, dtype=torch.int64, device=DEVICE), signs, 1, out)
    assert torch.equal(out.float().cpu(), torch.full((2, 32), max(value, 0.0)))
