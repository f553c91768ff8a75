"""Train the unpacked parameters of the whole quantised model end to end: its distribution is to be
that of the original."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from erniequant.calibration.rows import Rows
from erniequant.data.inputs import ModelInput
from erniequant.models.head import Head
from erniequant.tuning.config import Training
from erniequant.tuning.decoder_layer import DecoderLayer
from erniequant.tuning.training import Outcome, Window, train

POSITIONS = 256
"""Positions whose logits are in memory at once."""


@dataclass(frozen=True, eq=False)
class ModelProblem:
    """A quantised model in memory, with the calibration text in it and at the end of the original.

    Attributes:
        layers: with leaves for parameters and factors where they are to be trained.
        head: of the original.
        norm: weight of the last norm, float32 ``[H]``, a leaf.
        embedded: hidden states that go into the first layer, float32 ``[T, H]``.
        originals: hidden states that leave the last layer of the original, float32 ``[T, H]``;
            with the head they are its logits, exactly and in a hundredth of the space.
    """

    layers: Sequence[DecoderLayer]
    head: Head
    norm: torch.Tensor
    windows: Sequence[Window]
    embedded: Rows
    originals: Rows
    device: torch.device


def tune_model(
    problem: ModelProblem, leaves: Sequence[torch.Tensor], config: Training, threads: int
) -> Outcome:
    """Train ``leaves`` in place; the loss is the mean KL divergence from the original, in nats."""

    def loss(rows: slice, window: ModelInput) -> torch.Tensor:
        hidden = problem.embedded.tensor[rows][None].to(problem.device)
        for layer in problem.layers:
            if torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, window, use_reentrant=False)
            else:
                hidden = layer(hidden, window)
        return _divergence(problem, hidden[0].float(), problem.originals.tensor[rows])

    return train(leaves, problem.windows, loss, config, problem.device, threads)


def _divergence(
    problem: ModelProblem, hidden: torch.Tensor, original: torch.Tensor
) -> torch.Tensor:
    """Mean KL divergence of the distributions of two tables of hidden states ``[n, H]``."""

    def part(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            log_p = problem.head.logits(theirs).log_softmax(-1)
        log_q = problem.head.logits(mine, problem.norm).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    total = torch.zeros((), device=problem.device)
    for mine, theirs in zip(hidden.split(POSITIONS), original.split(POSITIONS), strict=True):
        theirs = theirs.to(problem.device)
        if torch.is_grad_enabled():
            total = total + checkpoint(part, mine, theirs, use_reentrant=False)
        else:
            total = total + part(mine, theirs)
    return total / len(hidden)
