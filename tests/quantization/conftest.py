"""A micro text to calibrate on, and one expert's worth of random data."""

from pathlib import Path

import pytest
import torch

from erniequant.codes import get_code
from erniequant.quantization.expert import (
    Evidence,
    ExpertWeights,
    LayerContext,
    ProjectionCodes,
)
from erniequant.quantization.matrix import Rotation
from erniequant.rotation import random_signs


@pytest.fixture(scope="session")
def micro_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 characters, enough for 40 windows of 64 tokens."""
    generator = torch.Generator().manual_seed(11)
    letters = torch.randint(32, 125, (3000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "micro.txt"
    path.write_text("".join(map(chr, letters)))
    return path


HIDDEN, INNER = 96, 64


def evidence(x: torch.Tensor, weights: torch.Tensor) -> Evidence:
    """Tokens of a first layer: nothing before it has been quantised."""
    return Evidence(x, x, torch.zeros_like(x), weights)


@pytest.fixture
def expert_weights() -> ExpertWeights:
    generator = torch.Generator().manual_seed(2)
    return ExpertWeights(
        torch.randn(INNER, HIDDEN, generator=generator) * 0.1,
        torch.randn(INNER, HIDDEN, generator=generator) * 0.1,
        torch.randn(HIDDEN, INNER, generator=generator) * 0.1,
    )


@pytest.fixture
def tokens() -> Evidence:
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
def layer(tokens: Evidence) -> LayerContext:
    generator = torch.Generator().manual_seed(4)
    code = get_code("cc2", 10)
    return LayerContext(
        ProjectionCodes(code, 32, code, 32),
        Rotation(random_signs(HIDDEN, generator), 32),
        Rotation(random_signs(INNER, generator), 64),
        tokens.x.T @ tokens.x / 500,
        torch.zeros(HIDDEN, HIDDEN),
        tokens.rows(torch.arange(0, 500, 10)),
    )
