"""What experts of a group share comes from the tokens of that group alone."""

import torch

from erniequant.encoding.matrix import Rotation, TrellisQuantizer
from erniequant.models.architecture import ExpertGroup, ModelSizes, MoeInput
from erniequant.packing.schema import MatrixSpec
from erniequant.quantization.layer import LayerInput, layer_context

TEXT, VISION = ExpertGroup("text_moe", 3, 64), ExpertGroup("vision_moe", 3, 32, first=3)
HIDDEN = 32
CPU = torch.device("cpu")


def inputs(vision: torch.Tensor) -> LayerInput:
    """Tokens of text are small, those of images large; every third routing weight is twice as
    high."""
    generator = torch.Generator().manual_seed(4)
    count = len(vision)
    x = torch.randn(count, HIDDEN, generator=generator) * (1 + 9 * vision[:, None])
    expert = torch.arange(count * 2).view(count, 2) % 3 + 3 * vision[:, None]
    weight = (1 + (torch.arange(count) % 3 == 0)).float()[:, None].expand(-1, 2) / 4
    both = MoeInput(x, expert, weight)
    everything = torch.ones(count, dtype=torch.bool)
    return LayerInput(both, both, torch.zeros(count, HIDDEN), everything, everything)


def pooled(given: LayerInput, group: ExpertGroup) -> torch.Tensor:
    quantizer = TrellisQuantizer(MatrixSpec("cc2", 10, 32, 32), Rotation(torch.ones(HIDDEN), 32))
    return layer_context(given, group, quantizer, quantizer, CPU).pooled


def mean_moments(given: LayerInput, rows: torch.Tensor) -> torch.Tensor:
    x, weight = given.quantized.x[rows], given.quantized.weight[rows].square().sum(-1)
    return (x * weight[:, None]).T @ x / weight.sum()


def test_each_group_pools_its_own_tokens() -> None:
    vision = torch.arange(60) % 4 == 1
    given = inputs(vision)
    for group, rows in ((TEXT, torch.where(~vision)[0]), (VISION, torch.where(vision)[0])):
        torch.testing.assert_close(pooled(given, group), mean_moments(given, rows))


def test_a_group_without_tokens_takes_those_of_the_layer() -> None:
    given = inputs(torch.zeros(60, dtype=torch.bool))
    torch.testing.assert_close(pooled(given, VISION), mean_moments(given, torch.arange(60)))
    nothing = inputs(torch.zeros(0, dtype=torch.bool))
    assert torch.equal(pooled(nothing, VISION), torch.zeros(HIDDEN, HIDDEN))


def test_numbers_of_experts() -> None:
    sizes = ModelSizes(HIDDEN, (TEXT, VISION), 2, 2, (1,), 9)
    assert sizes.experts == 6
    assert [sizes.group_of(e).name for e in (0, 2, 3, 5)] == [
        *["text_moe"] * 2,
        *["vision_moe"] * 2,
    ]
    assert (TEXT.layer_key(7), ExpertGroup("", 3, 64).layer_key(7)) == ("7.text_moe", "7")
