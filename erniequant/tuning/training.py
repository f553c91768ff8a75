"""Training on calibration windows: the same bits on any number of threads, stopped by held-out
windows."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from erniequant.data.inputs import ModelInput
from erniequant.encoding.products import fast_products
from erniequant.tuning.config import Training

WARM_UP = 5
"""Steps until the rate is reached; Adam's first steps are as large as its last, but blind."""
MOMENTUM = (0.9, 0.95)
SMALLEST_SIZE = 1e-3
"""Root mean square that smaller parameters, such as zeros, are taken to have."""

Window = tuple[slice, ModelInput]
"""Rows of a calibration window in the tables of a run, and the window."""

Loss = Callable[[slice, ModelInput], torch.Tensor]
"""The loss of one window."""


@dataclass(frozen=True)
class Outcome:
    """Mean loss of held-out windows before and after training, and the epochs that were kept: 0 if
    none was an improvement."""

    before: float
    after: float
    epochs: int


def train(
    parameters: Sequence[torch.Tensor],
    windows: Sequence[Window],
    loss: Loss,
    config: Training,
    device: torch.device,
    threads: int,
) -> Outcome:
    """Train ``parameters``, leaves with gradients, in place; they end as they were after the best
    epoch.

    Windows run on threads of one core each, and their gradients are added in order. With fewer
    windows than `Training.heldout` only the first is held out; a single one trains nothing.
    """
    heldout = windows[:: config.heldout]
    training = [window for i, window in enumerate(windows) if i % config.heldout]
    workers = ThreadPoolExecutor(threads if device.type == "cpu" else 1)

    def value(window: Window) -> float:
        with fast_products(device, gradients=False):
            return float(loss(*window))

    def gradient(window: Window) -> Sequence[torch.Tensor | None]:
        with fast_products(device, gradients=True):
            return torch.autograd.grad(loss(*window), list(parameters), allow_unused=True)

    def measured() -> float:
        return math.fsum(workers.map(value, heldout)) / len(heldout)

    try:
        before = best = measured()
        kept, epochs = [parameter.detach().clone() for parameter in parameters], 0
        optimizer, rates = _adam(parameters, config)
        steps = config.epochs * math.ceil(len(training) / config.windows_per_step)
        step = 0
        for epoch in range(1, config.epochs + 1 if training and math.isfinite(before) else 1):
            order = torch.randperm(len(training), generator=torch.Generator().manual_seed(epoch))
            for part in order.split(config.windows_per_step):
                found = workers.map(gradient, [training[i] for i in part.tolist()])
                _add_gradients(parameters, list(found))
                share = min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                optimizer.step()
                step += 1
            after = measured()
            if after < best:
                best, epochs = after, epoch
                kept = [parameter.detach().clone() for parameter in parameters]
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
    for parameter, value_kept in zip(parameters, kept, strict=True):
        parameter.data.copy_(value_kept)
    return Outcome(before, best, epochs)


def _adam(
    parameters: Sequence[torch.Tensor], config: Training
) -> tuple[torch.optim.Adam, list[float]]:
    """The optimizer, and the rate of each parameter."""
    sizes = [float(p.detach().square().mean().sqrt()) for p in parameters]
    relative = [config.matrix_rate if p.dim() > 1 else config.rate for p in parameters]
    rates = [r * max(size, SMALLEST_SIZE) for r, size in zip(relative, sizes, strict=True)]
    groups = [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)]
    return torch.optim.Adam(groups, betas=MOMENTUM, foreach=False), rates


def _add_gradients(
    parameters: Sequence[torch.Tensor], found: Sequence[Sequence[torch.Tensor | None]]
) -> None:
    """Sum the gradients of several windows; one that is not finite changes nothing."""
    for parameter, *gradients_of in zip(parameters, *found, strict=True):
        present = [g for g in gradients_of if g is not None and bool(torch.isfinite(g).all())]
        parameter.grad = sum(present[1:], present[0]) if present else None
