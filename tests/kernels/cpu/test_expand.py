"""Whole matrices decoded on the CPU, against plain torch to the last bit."""

import pytest
import torch

from erniequant.codes import CODE_NAMES, REGISTERED, get_code
from erniequant.packing.decoding import decode_weight
from erniequant.packing.rotation import block_size
from erniequant.packing.schema import MatrixSpec
from erniequant_kernels.cpu.expand import decode_weight_cpu
from tests.kernels.cpu.test_product import MACHINES, random_words


def assert_equal_bits(spec, tiles, inputs, on):
    code = spec.conv()
    packed = random_words(tiles, inputs * code.words_per_sequence(spec.tile))
    scale = torch.randn(tiles * spec.tile, 1).bfloat16().view(torch.int16)
    signs = random_words(-(-inputs // 32))
    found = decode_weight_cpu(packed, scale, signs, code, spec.tile, spec.rotation_block, on=on)
    expected = decode_weight(packed, scale, signs, spec)
    assert found.is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("name, length", REGISTERED)
def test_every_code(name, length, on):
    assert_equal_bits(MatrixSpec(name, length, 64, 32), 3, 96, on)


# tile, tiles, inputs. 17 inputs: one more than an item, without a rotation; 40: half an item at the
# end. A tile of 32 has as few as two groups, one of 256 fills two vectors.
SIZES = [(32, 1, 17), (32, 3, 40), (128, 2, 64), (256, 3, 48)]


@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("tile, tiles, inputs", SIZES)
def test_sizes(name, tile, tiles, inputs, on):
    assert_equal_bits(MatrixSpec(name, 12, tile, block_size(inputs)), tiles, inputs, on)


def test_a_code_has_exact_sums():
    # The sum of both halves is rounded nowhere, so decoded labels are bfloat16 numbers.
    code = get_code("cc4", 16)
    packed = random_words(1, 32 * code.words_per_sequence(256))
    scale = torch.ones(256, 1).bfloat16().view(torch.int16)
    found = decode_weight_cpu(packed, scale, torch.zeros(1, dtype=torch.int32), code, 256, 1)
    assert torch.equal(found.bfloat16().float(), found)
