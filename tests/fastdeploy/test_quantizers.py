"""The coders of FastDeploy's formats, one matrix at a time."""

from typing import Any

import pytest
import torch

from erniequant.formats.fastdeploy.output import Wint2Quantizer, Wint4Quantizer

OUTPUTS, INPUTS = 48, 128


@pytest.mark.parametrize(
    "quantizer",
    [Wint2Quantizer(INPUTS, "mma64"), Wint4Quantizer(INPUTS)],
    ids=lambda q: type(q).__name__,
)
def test_how_outputs_count_changes_no_byte(quantizer: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(200, INPUTS, generator=generator)
    rows = torch.randn(10, OUTPUTS, generator=generator)
    found = [
        quantizer.quantize(weight.clone(), x.T @ x / 200, importance).parts
        for importance in (
            torch.ones(OUTPUTS), torch.rand(OUTPUTS, generator=generator), rows.T @ rows,
            torch.full((OUTPUTS, OUTPUTS), float("nan")),
        )
    ]  # fmt: skip
    for parts in found[1:]:
        assert parts.keys() == found[0].keys()
        for suffix, part in parts.items():
            assert torch.equal(part, found[0][suffix]), suffix
