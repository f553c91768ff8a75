"""wint4 with error feedback: never worse than rounding, much better where inputs are correlated."""

from collections.abc import Callable

import pytest
import torch

from erniequant.formats.fastdeploy.packers import WINT4, PackedMatrix
from erniequant.formats.fastdeploy.wint4 import quantize_wint4

N, K = 48, 192


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def correlated() -> torch.Tensor:
    """Inputs that lie near a subspace of a quarter of the dimensions."""
    return torch.randn(2000, K // 4) @ torch.randn(K // 4, K) + 0.3 * torch.randn(2000, K)


def massive() -> torch.Tensor:
    """Two channels that hold nearly all energy, correlated with the others."""
    inputs = correlated()
    inputs[:, 17] += 300 * torch.randn(2000)
    inputs[:, 90] = inputs[:, 17] + inputs[:, 90]
    return inputs


def losses(weight: torch.Tensor, packed: PackedMatrix, hessian: torch.Tensor) -> torch.Tensor:
    """``e^T H e`` of every output, float64 ``[N]``."""
    decoded = WINT4.dequantize(packed.quant_weight, packed.weight_scale)
    error = weight.double() - decoded.T.double()
    return ((error @ hessian.double()) * error).sum(-1)


@pytest.mark.parametrize(("inputs", "bar"), [(correlated, 0.1), (massive, 0.1)])
def test_feedback_beats_rounding(inputs: Callable[[], torch.Tensor], bar: float) -> None:
    weight, hessian = torch.randn(N, K), hessian_of(inputs())
    before = hessian.clone()
    ours = losses(weight, quantize_wint4(weight, hessian), hessian)
    plain = losses(weight, WINT4.round(weight.T), hessian)
    assert ours.sum() < bar * plain.sum()
    assert torch.equal(hessian, before)


def test_no_output_is_worse_than_rounded() -> None:
    # So few weights reach beyond half a step that feedback can add to what rounding loses.
    weight, hessian = (torch.randn(256, K) ** 5).bfloat16(), hessian_of(correlated())
    ours = losses(weight, quantize_wint4(weight, hessian), hessian)
    plain = losses(weight, WINT4.round(weight.T), hessian)
    assert (ours <= plain * (1 + 1e-4)).all()


def test_clipping_alone_helps_when_inputs_are_independent() -> None:
    weight, hessian = torch.randn(N, K), torch.eye(K)
    ours = losses(weight, quantize_wint4(weight, hessian), hessian).sum()
    assert ours < 0.9 * losses(weight, WINT4.round(weight.T), hessian).sum()


@pytest.mark.parametrize(
    "hessian", [torch.zeros(K, K), torch.full((K, K), torch.nan)], ids=["zero", "nan"]
)
def test_without_a_usable_hessian(hessian: torch.Tensor) -> None:
    weight = torch.randn(N, K)
    packed = quantize_wint4(weight, hessian)
    assert (losses(weight, packed, torch.eye(K)) > 0).all()
    assert losses(weight, packed, torch.eye(K)).sum() < 0.02 * weight.square().sum()


def test_outputs_of_zeros() -> None:
    weight = torch.randn(N, K)
    weight[5] = 0
    packed = quantize_wint4(weight, hessian_of(correlated()))
    decoded = WINT4.dequantize(packed.quant_weight, packed.weight_scale)
    assert torch.equal(decoded[:, 5], torch.zeros(K)) and torch.isfinite(decoded).all()


def test_shape_without_layout() -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        quantize_wint4(torch.randn(16, 96), torch.eye(96))
