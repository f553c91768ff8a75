"""The input rotation against an explicit matrix, and its packing."""

import pytest
import torch

from erniequant.packing.rotation import (
    block_size,
    hadamard,
    pack_signs,
    random_signs,
    rotate,
    unpack_signs,
    unrotate,
)


@pytest.mark.parametrize(
    ("inputs", "block"),
    [(2560, 128), (1536, 128), (576, 64), (384, 128), (96, 32), (48, 16), (40, 1), (7, 1)],
)
def test_block_is_the_largest_power_of_two_worth_having(inputs: int, block: int) -> None:
    assert block_size(inputs) == block


def test_hadamard_is_the_sylvester_matrix() -> None:
    matrix = torch.tensor([[1.0]])
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(3, 48)
    expected = torch.cat([part @ matrix / 4 for part in x.split(16, dim=1)], 1)
    torch.testing.assert_close(hadamard(x, 16), expected)


def test_rotating_both_sides_keeps_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 96, generator=generator), torch.randn(7, 96, generator=generator)
    signs = random_signs(96, generator)
    torch.testing.assert_close(rotate(x, signs, 32) @ rotate(weight, signs, 32).T, x @ weight.T)
    torch.testing.assert_close(unrotate(rotate(x, signs, 32), signs, 32), x)


# 31, 32 and 33 lie around a word; bit 31 is the sign of an int32.
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 96])
def test_signs_survive_packing(inputs: int) -> None:
    signs = random_signs(inputs, torch.Generator().manual_seed(inputs))
    words = pack_signs(signs)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_signs(words, inputs), signs)


def test_sign_bit_order() -> None:
    signs = torch.ones(40)
    signs[[0, 31, 33]] = -1
    assert pack_signs(signs).tolist() == [-(2**31) + 1, 2]
