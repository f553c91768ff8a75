"""Outputs paired with code books, encoded side by side from the last group to the first; pairs that
fall behind are dropped on the way."""

from dataclasses import dataclass

import numpy as np
import torch

from erniequant.codes.ccq.decode import BYTE_WEIGHTS, GROUP
from erniequant.formats.fastdeploy.ccq.books import Book, book_labels
from erniequant.formats.fastdeploy.ccq.factor import BlockFactor, roots
from erniequant.formats.fastdeploy.ccq.search import BLOCKS, encode_group

STEPS_PER_SCALE = 1 / 17
"""Scale of a group over the root mean square of its aims; labels have a deviation of 17 to 19."""

DRY_NIBBLE = 12
"""The nibble that stands for the guessed scale while units are still free."""

RACE = 0.2
"""A pair may be behind the best of its output by this times the root of the sum of squares of the
losses that the dry run saw in the groups to come, a measure of how much those may change."""


@dataclass(eq=False)
class Candidates:
    """Pairs of an output and a code book, and their codes and errors so far.

    ``output`` and ``book`` int64 ``[n]``; ``codes`` uint8 ``[n, K / 4]``, ``nibbles`` uint8
    ``[n, K / 64]``, ``error`` float32 ``[n, K]`` and ``loss`` float64 ``[n]``, all in encoding
    order.
    """

    output: torch.Tensor
    book: torch.Tensor
    codes: torch.Tensor
    nibbles: torch.Tensor
    error: torch.Tensor
    loss: torch.Tensor

    def keep(self, which: torch.Tensor) -> "Candidates":
        """Some of them, by mask or index."""
        return Candidates(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def best(self, outputs: int) -> "Candidates":
        """The one with the least loss of each output, in the order of outputs."""
        least = self._least(outputs)
        winners = (self.loss <= least[self.output]).nonzero().squeeze(1)
        first = torch.full((outputs,), len(self.output))
        first.scatter_reduce_(0, self.output[winners], winners, "amin")
        return self.keep(first)

    def without_stragglers(self, slack: torch.Tensor) -> "Candidates":
        """Without those whose loss is more than ``slack`` ``[outputs]`` above the best of their
        output, if that is worth a copy."""
        stay = self.loss <= (self._least(len(slack)) + slack)[self.output]
        return self.keep(stay) if int(stay.sum()) < 0.8 * len(stay) else self

    def _least(self, outputs: int) -> torch.Tensor:
        least = torch.full((outputs,), torch.inf, dtype=torch.float64)
        return least.scatter_reduce_(0, self.output, self.loss, "amin")


@dataclass(frozen=True, eq=False)
class Plan:
    """Data that all outputs of a matrix share: code books, the factor and what follows from it."""

    books: tuple[Book, ...]
    factor: BlockFactor
    roots: torch.Tensor
    emphasis: torch.Tensor

    @staticmethod
    def of(factor: BlockFactor, books: tuple[Book, ...]) -> "Plan":
        """The plan that follows from a factor."""
        # The root of a row's weight: with the full weight, a massive row alone would choose the
        # scale.
        counts = factor.local.diagonal(dim1=1, dim2=2).flatten().sqrt().float()
        return Plan(books, factor, roots(factor.local), counts)

    def points(self, metric: torch.Tensor) -> np.ndarray:
        """Labels of all books in the metric of 16 blocks: float32 ``[books, 16, 4, 256]``."""
        return np.matmul(metric.numpy()[None], book_labels(self.books)[:, None])


@dataclass(frozen=True, eq=False)
class DryRun:
    """Outcome of the groups while each may take any scale, ``scales`` and ``losses`` float32 ``[n,
    K / 64]`` in encoding order."""

    scales: torch.Tensor
    losses: torch.Tensor


def dry_run(plan: Plan, weight: torch.Tensor, tries: int) -> DryRun:
    """Encode outputs ``[n, K]`` with the first code book and a unit for each group that puts its
    guessed scale at nibble `DRY_NIBBLE`."""
    candidates = _all_pairs(len(weight), 1, weight.shape[1])
    groups = weight.shape[1] // GROUP
    scales, losses = torch.zeros(len(weight), groups), torch.zeros(len(weight), groups)
    for group in reversed(range(groups)):
        before = candidates.loss.clone()
        unit = _encode_group(plan, weight, candidates, group, None, tries)
        scales[:, group] = candidates.nibbles[:, group] * unit
        losses[:, group] = candidates.loss - before
    return DryRun(scales, losses)


def race(
    plan: Plan, weight: torch.Tensor, unit: torch.Tensor, losses: torch.Tensor, tries: int
) -> Candidates:
    """Encode outputs with every code book; the best candidate of each output.

    Args:
        plan: the matrix's plan.
        weight: float32 ``[n, K]`` in encoding order.
        unit: float32 ``[n]``, the scale of nibble 1.
        losses: from `DryRun`.
        tries: number of nibbles that a group tries.
    """
    outputs, inputs = weight.shape
    candidates = _all_pairs(outputs, len(plan.books), inputs)
    to_come = losses.double().square().cumsum(1).sqrt()
    for group in reversed(range(inputs // GROUP)):
        _encode_group(plan, weight, candidates, group, unit, tries)
        if group and len(plan.books) > 1:
            candidates = candidates.without_stragglers(RACE * to_come[:, group - 1])
    return candidates.best(outputs)


def _all_pairs(outputs: int, books: int, inputs: int) -> Candidates:
    # Pairs of one book lie together: its points stay in the cache.
    pairs = outputs * books
    return Candidates(
        torch.arange(outputs).repeat(books),
        torch.arange(books).repeat_interleave(outputs),
        torch.zeros(pairs, inputs // BYTE_WEIGHTS, dtype=torch.uint8),
        torch.zeros(pairs, inputs // GROUP, dtype=torch.uint8),
        torch.zeros(pairs, inputs),
        torch.zeros(pairs, dtype=torch.float64),
    )


def _encode_group(
    plan: Plan,
    weight: torch.Tensor,
    candidates: Candidates,
    group: int,
    unit: torch.Tensor | None,
    tries: int,
) -> torch.Tensor:
    """Encode one group of all candidates, later groups being done; the unit of each."""
    start, end = group * GROUP, (group + 1) * GROUP
    rows, blocks = slice(start, end), slice(start // BYTE_WEIGHTS, end // BYTE_WEIGHTS)
    feedback, counts = plan.factor.feedback, plan.emphasis[rows]
    own = weight[candidates.output, rows]
    aim = torch.addmm(own, candidates.error[:, end:], feedback[end:, rows])
    guess = (aim.square() @ counts / counts.sum()).sqrt() * STEPS_PER_SCALE
    each = guess / DRY_NIBBLE if unit is None else unit[candidates.output]
    first = (guess / each).nan_to_num_(0).add_(0.5).floor_().clamp_(0, 15)
    codes = torch.zeros(len(own), BLOCKS, dtype=torch.uint8)
    nibbles = torch.zeros(len(own), dtype=torch.uint8)
    error = own.clone()
    encode_group(
        own.numpy(),
        aim.numpy(),
        feedback[rows, rows].contiguous().numpy(),
        plan.roots[blocks].numpy(),
        plan.points(plan.roots[blocks]),
        book_labels(plan.books),
        candidates.book.numpy(),
        each.numpy(),
        first.long().numpy(),
        tries,
        codes.numpy(),
        nibbles.numpy(),
        error.numpy(),
        candidates.loss.numpy(),
    )
    candidates.codes[:, blocks] = codes
    candidates.error[:, rows] = error
    candidates.nibbles[:, group] = nibbles
    return each


assert BLOCKS * BYTE_WEIGHTS == GROUP
