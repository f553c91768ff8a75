"""Output scales times a factor, in every layout: the decoded weights times that factor, up to the
rounding of the scale."""

from typing import Any

import pytest
import torch

from erniequant.encoding.matrix import Rotation, TrellisQuantizer
from erniequant.formats.fastdeploy.output import Wint2Quantizer, Wint4Quantizer
from erniequant.packing.rotation import random_signs
from erniequant.packing.schema import MatrixSpec

# Inputs of 128 are what WINT2 has at least; 96 outputs are no power of two.
OUTPUTS, INPUTS = 96, 128


def native() -> TrellisQuantizer:
    signs = random_signs(INPUTS, torch.Generator().manual_seed(4))
    return TrellisQuantizer(MatrixSpec("cc2", 10, 32, 128), Rotation(signs, 128))


QUANTIZERS = {
    "native": (native, {"scale"}),
    "wint2, mma64": (lambda: Wint2Quantizer(INPUTS, "mma64"), {"super_scales"}),
    "wint2, plain": (lambda: Wint2Quantizer(INPUTS, "plain"), {"super_scales"}),
    "wint4": (lambda: Wint4Quantizer(INPUTS), {"weight_scale"}),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_decoded_weights_have_the_factor(name: str) -> None:
    make, suffixes = QUANTIZERS[name]
    quantizer: Any = make()
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.1
    parts = quantizer.quantize(weight, torch.eye(INPUTS), torch.ones(OUTPUTS)).parts
    before = quantizer.decode(parts)
    # Halves to twice: each output has its own, so a transposed or reordered scale shows.
    factors = 2 ** (2 * torch.rand(OUTPUTS, generator=generator) - 1)
    changed = quantizer.rescaled(parts, factors)
    assert changed.keys() == suffixes
    for suffix, part in changed.items():
        assert part.dtype == parts[suffix].dtype and part.shape == parts[suffix].shape
    after = quantizer.decode({**parts, **changed})
    # bfloat16 has eight bits of mantissa.
    expected = factors[:, None] * before
    assert ((after - expected).abs() <= 2**-8 * expected.abs() + 1e-12).all()
    assert (after - before).norm() > 0.2 * before.norm()
    # Factors of one change nothing at all.
    same = quantizer.rescaled(parts, torch.ones(OUTPUTS))
    assert all(torch.equal(same[suffix], parts[suffix]) for suffix in suffixes)
