"""One packed matrix on the CPU, in code for several processors, against its decoded weights."""

import pytest
import torch

from erniequant.codes import CODE_NAMES
from erniequant.packing.schema import MatrixSpec
from erniequant_kernels.cpu.linear import packed_linear_cpu
from tests.kernels.cpu.test_product import MACHINES
from tests.kernels.test_linear import expected_of, matrix_of

BOUNDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("dtype", BOUNDS)
# Blocks that are not grouped, alone and several; groups and a rest.
@pytest.mark.parametrize("tokens", [0, 1, 17, 120])
def test_against_decoded_weights(name, dtype, tokens, on):
    # Odd multiples of tile and block; rows of 576 inputs end within a block of 128.
    spec = MatrixSpec(name, 12, 32, 64)
    matrix = matrix_of(spec, 160, 576)
    x = torch.randn(tokens, 576).to(dtype)
    found, expected = packed_linear_cpu(x, matrix, on=on), expected_of(x, matrix, spec)
    assert found.shape == (tokens, 160) and found.dtype == dtype
    if tokens:
        bound = BOUNDS[dtype] * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_do_not_change_a_bit(dtype):
    # Enough work for three threads, see `LEAST_SHARE`.
    matrix = matrix_of(MatrixSpec("cc3", 12, 64, 128), 3072, 1024)
    x = torch.randn(40, 1024).to(dtype).T.contiguous().T
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed_linear_cpu(x, matrix))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
