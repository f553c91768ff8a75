"""The round-to-nearest baseline against arithmetic done by hand."""

import pytest
import torch

from erniequant.evaluate import round_to_nearest


def test_two_bits_by_hand():
    # Range -1..2 in three steps of 1, zero point 1: the grid is {-1, 0, 1, 2}.
    weight = torch.tensor([[-1.0, -0.4, 0.6, 2.0]])
    found = round_to_nearest(weight, 2, group=4)
    assert found.weight.tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    assert found.bits_per_weight == 2 + (16 + 2) / 4


# 64: one group; 65 and 130: a last group of 1 and 2 inputs; a third dimension: stacked experts.
@pytest.mark.parametrize("shape", [(3, 64), (3, 65), (2, 3, 130)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_group_uses_its_levels_and_no_more(shape, bits):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(weight, bits)
    assert found.weight.shape == weight.shape
    for group, rounded in zip(weight.split(64, -1), found.weight.split(64, -1), strict=True):
        reach = torch.maximum(group.amax(-1), torch.zeros(())) - group.amin(-1).clamp(max=0)
        # Half a step of the grid, plus the rounding of scale (2^-8) and zero point (half a step).
        allowed = reach / (2**bits - 1) * 1.02 + 2**-8 * reach
        assert ((rounded - group).abs().amax(-1) <= allowed).all()
        for row in rounded.reshape(-1, rounded.shape[-1]):
            assert row.unique().numel() <= 2**bits


def test_more_bits_and_clip_search_help():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))

    def error(bits, **options):
        return (round_to_nearest(weight, bits, **options).weight - weight).square().mean().item()

    assert error(2) > 3 * error(3) > 9 * error(4)
    # Measured on Gaussian weights: the best clip per group leaves 0.61 of the error at 2 bits.
    assert error(2, search_clip=True) < 0.7 * error(2)
    assert error(4, search_clip=True) <= error(4)


def test_zeros_stay_zeros_and_a_lone_value_survives():
    weight = torch.zeros(2, 64)
    weight[1, 5] = 3.0
    found = round_to_nearest(weight, 2).weight
    assert (found[0] == 0).all()
    assert found[1, 5] == pytest.approx(3.0, rel=2**-8)


def test_bf16_weights_are_rounded_in_float32():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    found = round_to_nearest(weight, 4).weight
    assert found.dtype == torch.float32
    assert torch.equal(found, round_to_nearest(weight.float(), 4).weight)


def test_refuses_other_bits():
    with pytest.raises(ValueError, match="not 9"):
        round_to_nearest(torch.zeros(1, 8), 9)


def test_zero_stays_zero_among_negative_weights():
    # The scale is rounded to bf16; where it got smaller, the zero point would leave its 8 bits.
    weight = -torch.rand(200, 64, generator=torch.Generator().manual_seed(3))
    weight[:, 0] = 0
    assert (round_to_nearest(weight, 8).weight[:, 0] == 0).all()
