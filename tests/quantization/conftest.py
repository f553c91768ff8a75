"""One expert's worth of random data."""

import pytest
import torch

from erniequant.encoding.matrix import Rotation, TrellisQuantizer
from erniequant.packing.rotation import random_signs
from erniequant.packing.schema import MatrixSpec
from erniequant.quantization.expert import ExpertWeights, LayerContext
from erniequant.quantization.token_batches import TokenBatch

HIDDEN, INNER = 96, 64


def evidence(x: torch.Tensor, weights: torch.Tensor) -> TokenBatch:
    """Tokens of a first layer: nothing before it has been quantised."""
    return TokenBatch(x, x, torch.zeros_like(x), weights)


@pytest.fixture
def expert_weights() -> ExpertWeights:
    generator = torch.Generator().manual_seed(2)
    matrices = {
        "gate_proj": torch.randn(INNER, HIDDEN, generator=generator) * 0.1,
        "up_proj": torch.randn(INNER, HIDDEN, generator=generator) * 0.1,
        "down_proj": torch.randn(HIDDEN, INNER, generator=generator) * 0.1,
    }
    return ExpertWeights(matrices.__getitem__)


@pytest.fixture
def tokens() -> TokenBatch:
    """500 tokens with correlated channels of uneven size."""
    generator = torch.Generator().manual_seed(3)
    mix = (
        torch.randn(HIDDEN, HIDDEN, generator=generator)
        * torch.rand(HIDDEN, generator=generator)
        * 0.3
    )
    x = torch.randn(500, HIDDEN, generator=generator) @ (mix + torch.eye(HIDDEN))
    return evidence(x, torch.rand(500, generator=generator))


@pytest.fixture
def layer(tokens: TokenBatch) -> LayerContext:
    generator = torch.Generator().manual_seed(4)
    return LayerContext(
        TrellisQuantizer(
            MatrixSpec("cc2", 10, 32, 32), Rotation(random_signs(HIDDEN, generator), 32)
        ),
        TrellisQuantizer(
            MatrixSpec("cc2", 10, 32, 64), Rotation(random_signs(INNER, generator), 64)
        ),
        tokens.x.T @ tokens.x / 500,
        torch.zeros(HIDDEN, HIDDEN),
        tokens.rows(torch.arange(0, 500, 10)),
    )
