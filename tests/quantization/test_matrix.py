"""Errors, scales and packing of one matrix, against direct computation."""

import pytest
import torch

from erniequant.codes import CODE_NAMES, get_code
from erniequant.codes.reference import decode
from erniequant.encoding.matrix import (
    Rotation,
    TrellisQuantizer,
    bounded_weight,
    quantize_matrix,
    refit_scale,
    reorder_moments,
    rotate_moments,
)
from erniequant.packing.rotation import random_signs, rotate, unrotate
from erniequant.packing.schema import MatrixSpec


def relative_error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (other - weight).double()
    loss = torch.einsum("ni,ij,nj->", difference, hessian.double(), difference)
    energy = torch.einsum("ni,ij,nj->", weight.double(), hessian.double(), weight.double())
    return float(loss / energy)


def correlated_hessian(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * 0.3 + torch.eye(size)
    x = torch.randn(4 * size, size, generator=generator) @ mix
    return x.T @ x / (4 * size)


@pytest.mark.parametrize("name", CODE_NAMES)
def test_packed_form_decodes_to_the_effective_weights(name: str) -> None:
    code, generator = get_code(name, 10), torch.Generator().manual_seed(5)
    weight = torch.randn(96, 48, generator=generator)
    rotation = Rotation(random_signs(48, generator), 16)
    found = quantize_matrix(weight, correlated_hessian(48), torch.ones(96), rotation, code, 32)
    labels = decode(found.parts["packed"], code, 32)
    scale = found.parts["scale"].view(torch.bfloat16).float()
    again = unrotate(labels * scale, rotation.signs, rotation.block)
    assert torch.equal(again, found.effective)
    spec = MatrixSpec(name, 10, 32, 16)
    assert torch.equal(TrellisQuantizer(spec, rotation).decode(found.parts), found.effective)


def test_feedback_and_rotation_beat_rounding_without_them() -> None:
    generator = torch.Generator().manual_seed(6)
    weight, hessian = torch.randn(128, 96, generator=generator), correlated_hessian(96)
    code = get_code("cc2", 10)
    rotation = Rotation(random_signs(96, generator), 32)
    found = quantize_matrix(weight, hessian.clone(), torch.ones(128), rotation, code, 64)
    blind = quantize_matrix(weight, torch.eye(96), torch.ones(128), rotation, code, 64)
    assert found.error == pytest.approx(relative_error(weight, found.effective, hessian), rel=1e-4)
    assert found.error < 0.6 * relative_error(weight, blind.effective, hessian)
    # Without a Hessian the error is that of the code on Gaussian data, up to short sequences.
    assert 0.075 < blind.error < 0.095


def test_refitted_scale_is_the_minimum() -> None:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(40, 8, generator=generator)
    labels = rows + 0.3 * torch.randn(40, 8, generator=generator)
    hessian = correlated_hessian(40)
    scale, error = refit_scale(labels, rows, hessian, torch.ones(8))
    assert error == pytest.approx(relative_error(rows.T, (labels * scale).T, hessian), rel=1e-4)

    def loss(factor: torch.Tensor) -> torch.Tensor:
        error = rows - labels * factor
        return ((hessian @ error) * error).sum(0)

    # bfloat16 rounds by up to 2^-9, so compare at 2 %.
    assert (loss(scale) < loss(scale * 1.02)).all()
    assert (loss(scale) < loss(scale * 0.98)).all()
    kept, _ = refit_scale(torch.zeros(40, 8), rows, hessian, torch.full((8,), 0.5))
    assert torch.equal(kept, torch.full((8,), 0.5))


def test_important_outputs_get_less_error() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(64, 64, generator=generator)
    rotation = Rotation(random_signs(64, generator), 64)
    importance = torch.ones(64)
    importance[::4] = 30
    code = get_code("cc2", 12)
    found = quantize_matrix(weight, torch.eye(64), importance, rotation, code, 64)
    error = (found.effective - weight).square().mean(1)
    assert error[::4].mean() < 0.5 * error[1::4].mean()
    plain = quantize_matrix(weight, torch.eye(64), torch.ones(64), rotation, code, 64)
    even = (plain.effective - weight).square().mean(1)
    assert (importance * error).sum() < 0.8 * (importance * even).sum()


def test_importance_is_bounded_and_never_degenerate() -> None:
    wild = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e30])
    bounded = bounded_weight(wild)
    assert float(bounded.max() / bounded.min()) <= 1e6 * 1.001
    for useless in (torch.zeros(8), torch.full((8,), float("nan"))):
        assert torch.equal(bounded_weight(useless), torch.ones(8))


@pytest.mark.parametrize("case", ["zero matrix", "zero output", "huge output", "zero Hessian"])
def test_odd_matrices_stay_finite(case: str) -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(9))
    hessian = torch.zeros(32, 32) if case == "zero Hessian" else torch.eye(32)
    if case == "zero matrix":
        weight.zero_()
    elif case == "zero output":
        weight[3] = 0
    elif case == "huge output":
        weight[3] *= 1e6
    rotation = Rotation(torch.ones(32), 32)
    found = quantize_matrix(weight, hessian, torch.ones(64), rotation, get_code("cc4", 10), 32)
    assert torch.isfinite(found.effective).all()
    ordinary = [i for i in range(64) if i != 3]
    error = (found.effective - weight)[ordinary].square().sum()
    assert error <= 0.02 * weight[ordinary].square().sum() + 1e-12
    if case == "zero output":
        assert found.effective[3].abs().max() < 1e-4


def test_rotated_moments_are_those_of_rotated_inputs() -> None:
    generator = torch.Generator().manual_seed(10)
    x, rotation = torch.randn(200, 48, generator=generator), None
    rotation = Rotation(random_signs(48, generator), 16)
    rotated = rotate(x, rotation.signs, rotation.block)
    expected = rotated.T @ rotated
    found = x.T @ x
    rotate_moments(found, rotation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    order = torch.randperm(48, generator=generator)
    again = found.clone()
    reorder_moments(again, order)
    assert torch.equal(again, found[order][:, order])
