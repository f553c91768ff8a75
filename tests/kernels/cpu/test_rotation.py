"""Rotation on the CPU against plain torch, to the last bit."""

import pytest
import torch

from erniequant.packing.rotation import block_size
from erniequant_kernels.cpu.machine import machine
from erniequant_kernels.cpu.rotation import (
    RotationSpec,
    rotate_reference,
    rotation,
    swiglu_reference,
)


def rotated(x, rows, signs, block, dtype, swiglu=False):
    inputs = x.shape[1] // (2 if swiglu else 1)
    out = torch.full((len(rows), inputs), torch.nan, dtype=dtype)
    rotate = rotation(RotationSpec(inputs, block, dtype == torch.bfloat16, swiglu), machine())
    rotate(len(rows), *(tensor.data_ptr() for tensor in (rows, x, signs, out)))
    return out


# 2560 and 1536: the 21B. 96, 48: blocks of one word of signs, and of half a word; 24, 5: no
# rotation, only signs (a block of 1), within a word; 80: two blocks of 16 share a word.
@pytest.mark.parametrize("inputs", [2560, 1536, 96, 48, 80, 24, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_plain_torch(inputs, dtype):
    block = block_size(inputs)
    x = torch.randn(4, inputs) * 10.0 ** torch.randint(-3, 4, (4, 1))
    signs = torch.randint(-(2**31), 2**31, (-(-inputs // 32),)).to(torch.int32)
    rows = torch.tensor([3, 0, 0, 2, 1])
    found = rotated(x, rows, signs, block, dtype)
    assert torch.equal(found, rotate_reference(x[rows], signs, block, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_number_stays_so(dtype):
    x = torch.zeros(2, 128)
    x[0, 3], x[1, 64] = torch.nan, torch.inf
    signs = torch.zeros(4, dtype=torch.int32)
    found = rotated(x, torch.tensor([0, 1]), signs, 64, dtype)
    assert found[0, :64].isnan().all() and found[1, 64:].isinf().all()
    assert not found[0, 64:].any() and not found[1, :64].any()


@pytest.mark.parametrize("inputs", [1536, 80, 5])
def test_swiglu(inputs):
    # Gates from where the exponential overflows to where it vanishes.
    x = torch.randn(3, 2 * inputs)
    x[1] *= 30
    x[2, :inputs] = torch.linspace(-120, 120, inputs)
    signs = torch.randint(-(2**31), 2**31, (-(-inputs // 32),)).to(torch.int32)
    rows, block = torch.tensor([2, 1, 0]), block_size(inputs)
    found = rotated(x, rows, signs, block, torch.float32, swiglu=True)
    expected = rotate_reference(swiglu_reference(x[rows].double()), signs, block, torch.float64)
    bound = 1e-6 * expected.abs().amax(1, keepdim=True)
    assert ((found - expected).abs() <= bound).all()
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    found = rotated(x, rows, signs, block, torch.float32, swiglu=True)
    assert found[2].isnan().any() and not found[1].isfinite().all() and found[0].isfinite().all()
