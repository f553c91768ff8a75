"""The loop over calibration windows: on problems whose optimum is known."""

import pytest
import torch

from erniequant.data.inputs import ModelInput
from erniequant.tuning.config import Training
from erniequant.tuning.training import train

CPU = torch.device("cpu")
CONFIG = Training(epochs=8, windows_per_step=3, rate=0.1, matrix_rate=0.1, heldout=4)


def windows(count):
    """Windows of three tokens each."""
    return [
        (slice(3 * i, 3 * i + 3), ModelInput(torch.zeros(3, dtype=torch.int64)))
        for i in range(count)
    ]


def regression(count=13, seed=0):
    """Targets that one vector explains: its loss, and that vector. 13 windows leave a step of two
    after three of three."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * count, 5, generator=generator)
    truth = torch.tensor([0.5, -1.0, 2.0, 0.7, 1.2])

    def loss_of(parameter):
        def loss(rows, window):
            # No matrix product: these are in bfloat16 on some processors.
            return (x[rows] * (parameter - truth)).sum(-1).square().mean()

        return loss

    return loss_of, truth


def test_a_known_optimum_comes_nearer():
    loss_of, truth = regression()
    parameter = torch.ones(5, requires_grad=True)
    before = (parameter.detach() - truth).norm()
    outcome = train([parameter], windows(13), loss_of(parameter), CONFIG, CPU, 2)
    assert outcome.epochs > 0
    assert outcome.after < 0.5 * outcome.before
    assert (parameter.detach() - truth).norm() < 0.8 * before
    # The parameters are those of the best epoch, not of the last.
    with torch.no_grad():
        held = [loss_of(parameter)(*window) for window in windows(13)[::4]]
    assert float(torch.stack(held).mean()) == pytest.approx(outcome.after, rel=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads):
    results = []
    for count in (1, threads):
        loss_of, _ = regression()
        parameter = torch.ones(5, requires_grad=True)
        train([parameter], windows(13), loss_of(parameter), CONFIG, CPU, count)
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_what_helps_only_the_trained_windows_is_not_kept():
    parameter = torch.ones(4, requires_grad=True)

    def loss(rows, window):
        # The held-out windows, each fourth, want the opposite of all others.
        wanted = 1.0 if (rows.start // 3) % CONFIG.heldout == 0 else 3.0
        return (parameter - wanted).square().mean() + 1

    outcome = train([parameter], windows(9), loss, CONFIG, CPU, 1)
    assert (outcome.epochs, outcome.before, outcome.after) == (0, 1.0, 1.0)
    assert torch.equal(parameter.detach(), torch.ones(4))


@pytest.mark.parametrize("count", [1, 2])
def test_few_windows_do_no_harm(count):
    loss_of, _ = regression(count)
    parameter = torch.ones(5, requires_grad=True)
    outcome = train([parameter], windows(count), loss_of(parameter), CONFIG, CPU, 1)
    assert outcome.after <= outcome.before
    assert count > 1 or outcome.epochs == 0


def test_gradients_that_are_not_finite_are_left_out():
    loss_of, _ = regression()
    parameter = torch.ones(5, requires_grad=True)
    plain = loss_of(parameter)

    def loss(rows, window):
        return plain(rows, window) * (float("nan") if rows.start == 3 else 1.0)

    outcome = train([parameter], windows(13), loss, CONFIG, CPU, 2)
    assert bool(torch.isfinite(parameter).all())
    assert outcome.after < outcome.before


def test_a_loss_that_is_not_finite_trains_nothing():
    parameter = torch.ones(5, requires_grad=True)
    outcome = train(
        [parameter], windows(9), lambda rows, window: parameter.sum() * float("inf"), CONFIG, CPU, 1
    )
    assert outcome.epochs == 0
    assert torch.equal(parameter.detach(), torch.ones(5))
