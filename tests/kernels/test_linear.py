"""One packed matrix on the kernels, in every regime, against its decoded weights."""

from dataclasses import replace

import pytest
import torch

from erniequant.errors import ErnieQuantError
from erniequant.packing.decoding import decode_weight
from erniequant.packing.schema import MatrixSpec
from erniequant_kernels import launch, linear
from erniequant_kernels.linear import packed_linear
from erniequant_kernels.matrices import PackedMatrices
from erniequant_kernels.tuning import FusedTile, PackedTile, Tuning, TuningRow
from tests.kernels.products import DEVICE, random_words

SPEC = MatrixSpec("cc2", 12, 64, 32)

# 96 inputs in turns of 32: three splits where many warps are wanted, one where few are.
REGIMES = {
    "whole": (1, "packed", 8, PackedTile(32, 1, 2)),
    "split": (64, "packed", 16, PackedTile(32, 2, 2)),
    "fused": (1, "fused", 16, FusedTile(64, 32, 4, 2)),
}


def table(regime):
    warps_wanted, kernel, block_m, tile = REGIMES[regime]
    tiles = dict.fromkeys((2, 3, 4), tile)
    return Tuning(warps_wanted, (TuningRow(float("inf"), kernel, block_m, tiles),))


def matrix_of(spec, outputs, inputs):
    code = spec.conv()
    packed = random_words(1, outputs // spec.tile, inputs * code.words_per_sequence(spec.tile))
    scale = (torch.rand(1, outputs, 1) * 0.1 + 0.02).bfloat16().view(torch.int16).to(DEVICE)
    signs = random_words(-(-inputs // 32))
    return PackedMatrices(packed, scale, signs, code, spec.tile, spec.rotation_block)


def expected_of(x, matrix, spec):
    weight = decode_weight(matrix.packed[0], matrix.scale[0], matrix.signs, spec)
    return x.double() @ weight.double().T


def check(regime, tokens, name="cc2", dtype=torch.bfloat16):
    # 192 = 64 * 3 outputs: half a block of outputs is left over in each regime.
    spec = replace(SPEC, code=name)
    matrix = matrix_of(spec, 192, 96)
    x = torch.randn(tokens, 96, device=DEVICE).to(dtype)
    found = packed_linear(x, matrix, table(regime))
    expected = expected_of(x, matrix, spec)
    assert found.dtype == dtype and found.shape == expected.shape
    error = (found.double() - expected).abs().max()
    # Rotated inputs are rounded to bfloat16, results to their type.
    assert error <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("regime", REGIMES)
# 17 and 33 begin another row tile of either size with one token.
@pytest.mark.parametrize("tokens", [1, 3, 17, 33])
def test_any_number_of_tokens(regime, tokens):
    check(regime, tokens)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", ["cc2s", "cc3", "cc4"])
def test_every_code(regime, name):
    check(regime, 5, name)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activation_types(regime, dtype):
    check(regime, 5, dtype=dtype)


@pytest.mark.parametrize("regime", REGIMES)
def test_no_tokens(regime):
    x = torch.empty(0, 96, dtype=torch.float16, device=DEVICE)
    found = packed_linear(x, matrix_of(SPEC, 192, 96), table(regime))
    assert found.shape == (0, 192) and found.dtype == torch.float16


def test_more_tokens_than_are_kept(monkeypatch):
    monkeypatch.setattr(linear, "TOKENS_KEPT", 2)
    check("whole", 3)
    check("whole", 9)


def test_the_routing_is_not_built_in_a_graph(monkeypatch):
    check("whole", 2)
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    check("whole", 3)
    with pytest.raises(ErnieQuantError, match="being captured"):
        check("whole", linear.TOKENS_KEPT + 1)
