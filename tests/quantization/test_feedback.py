"""Error feedback along the inputs and from tile to tile of the outputs, against the plain recursion
and the loss in closed form."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from erniequant.codes import get_code
from erniequant.codes.viterbi import Encoder, encoder
from erniequant.encoding.hessian import factorise
from erniequant.encoding.ldlq import BLOCK, OutputFactor, encode_matrix
from erniequant.encoding.matrix import OUTPUT_DAMPING, initial_scale, output_factor

pytestmark = pytest.mark.usefixtures("float32_products")

TILE, OUTPUTS = 32, 96
"""Three tiles: the middle one gives and takes feedback, and 96 is no power of two."""


def moments(size: int, seed: int) -> torch.Tensor:
    """Second moments of fewer samples than channels, so with strong correlations, plus a little of
    everything; sizes of channels are uneven."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size // 2, size, generator=generator) * (
        torch.rand(size, generator=generator) + 0.2
    )
    return 2 * x.T @ x / size + 0.05 * torch.eye(size)


def dyadic(*shape: int, steps: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    """Random multiples of ``2^-bits``, up to ``steps`` of them on either side of zero."""
    return torch.randint(-steps, steps + 1, shape, generator=generator) * 2.0**-bits


def sparse_below_diagonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """Unit lower triangular, with about three eighths in every column."""
    eighths = dyadic(size, size, steps=1, bits=3, generator=generator)
    chosen = torch.rand(size, size, generator=generator) < 4.5 / size
    return (eighths * chosen).tril(-1) + torch.eye(size)


def plain_recursion(
    weight: torch.Tensor,
    feedback: torch.Tensor,
    scale: torch.Tensor,
    outputs: OutputFactor,
    search: Encoder,
) -> np.ndarray:
    """Words, one sequence after another: each aims at its weights, at the errors of the rows after
    it, and at what the tiles after it have missed in the same row."""
    rows = len(weight)
    error, missed = torch.zeros_like(weight), torch.zeros_like(weight)
    words = np.zeros((rows, OUTPUTS // TILE, TILE * search.code.bits // 32), np.uint32)
    for tile in reversed(range(OUTPUTS // TILE)):
        here, later = slice(TILE * tile, TILE * (tile + 1)), slice(TILE * (tile + 1), None)
        importance = outputs.weight[here] / outputs.weight[here].mean()
        for k in reversed(range(rows)):
            aim = weight[k, here] + feedback[k + 1 :, k] @ error[k + 1 :, here]
            target = aim / scale[here]
            if outputs.feedback is not None:
                target = target + missed[k, later] @ outputs.feedback[later, here]
            found, labels = search.encode(target[None].numpy(), importance[None].numpy())
            words[k, tile] = found[0]
            label = torch.from_numpy(labels[0])
            error[k, here] = weight[k, here] - label * scale[here]
            missed[k, here] = aim / scale[here] - label
    return words


@pytest.mark.parametrize("both_sides", [False, True])
def test_feedback_equals_the_plain_recursion(both_sides: bool) -> None:
    # Two whole blocks of rows and two rows: within a block and across blocks. All numbers are
    # small multiples of powers of two and scales are powers of two, so that sums are exact in any
    # order.
    rows = 2 * BLOCK + 2
    generator = torch.Generator().manual_seed(1)
    weight = dyadic(rows, OUTPUTS, steps=400, bits=8, generator=generator)
    scale = 2.0 ** torch.randint(-1, 2, (OUTPUTS,), generator=generator)
    feedback = sparse_below_diagonal(rows, generator)
    of_tiles = sparse_below_diagonal(OUTPUTS, generator)
    # More of it than three entries a column.
    of_tiles[64:, :64] = dyadic(32, 64, steps=1, bits=3, generator=generator)
    importance = 2.0 ** torch.randint(-2, 3, (OUTPUTS,), generator=generator)
    outputs = OutputFactor(importance, of_tiles if both_sides else None)
    search = encoder(get_code("cc2", 8))
    found = encode_matrix(weight, feedback, scale, outputs, search, TILE)
    expected = plain_recursion(weight, feedback, scale, outputs, search)
    np.testing.assert_array_equal(found.words, expected)


class Recorder:
    """Stands in for a compiled search of rows, and keeps what labels missed of their targets."""

    def __init__(self, search: Encoder):
        self._search = search.search_rows
        self.missed: list[torch.Tensor] = []

    def __call__(self, aims: np.ndarray, feedback: Any, scale: np.ndarray, *others: Any) -> None:
        self._search(aims, feedback, scale, *others)
        labels = others[-1]
        self.missed.append(torch.from_numpy(aims / scale - labels).double())


def test_what_tiles_miss_adds_up_to_the_loss() -> None:
    # tr(G E H E^T) is the sum over rows k and tiles c of D_k r^T B_c r, if r is what the search
    # has left of its target.
    rows = 40
    hessian, metric = moments(rows, seed=2), moments(OUTPUTS, seed=3)
    weight = torch.randn(rows, OUTPUTS, generator=torch.Generator().manual_seed(4))
    search = encoder(get_code("cc2", 8))
    scale = initial_scale(weight, search.code, search)
    factor, outputs = factorise(hessian), output_factor(metric, scale, TILE)
    recorder = Recorder(search)
    found = encode_matrix(
        weight, factor.feedback, scale, outputs, replace(search, search_rows=recorder), TILE
    )
    assert len(recorder.missed) == OUTPUTS // TILE
    missed = torch.cat(recorder.missed[::-1], dim=1)

    damped = hessian.double() + factor.damping * hessian.diagonal().mean() * torch.eye(rows)
    scaled = (metric * scale * scale[:, None]).double()
    scaled += OUTPUT_DAMPING * scaled.diagonal().mean() * torch.eye(OUTPUTS)
    error = (weight - found.labels * scale).double() / scale
    dense = float(((error.T @ damped @ error) * scaled).sum())
    by_row = torch.linalg.cholesky(damped).diagonal().square()
    total = sum(
        torch.einsum("k,ki,ij,kj->", by_row, part, own, part)
        for part, own in zip(missed.split(TILE, 1), own_metrics(scaled), strict=True)
    )
    assert float(total) == pytest.approx(dense, rel=1e-5)


def own_metrics(metric: torch.Tensor) -> list[torch.Tensor]:
    """``B_c`` of every tile by definition: its part of the metric when all errors of the tiles
    after it are chosen for the best, the Schur complement of these. With L lower triangular it is
    the tiles before that are eliminated."""
    found = []
    for start in range(0, len(metric), TILE):
        here, before = slice(start, start + TILE), slice(0, start)
        across = metric[here, before]
        found.append(
            metric[here, here] - across @ torch.linalg.solve(metric[before, before], across.T)
        )
    return found


def test_the_factor_of_the_metric_by_definition() -> None:
    metric, scale = moments(OUTPUTS, seed=5), torch.rand(OUTPUTS) + 0.5
    found = output_factor(metric, scale, TILE)
    assert found.feedback is not None
    scaled = (metric * scale * scale[:, None]).double()
    scaled += OUTPUT_DAMPING * scaled.diagonal().mean() * torch.eye(OUTPUTS)
    own = own_metrics(scaled)
    weight = torch.cat([part.diagonal() for part in own])
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-5, atol=0)
    lower = found.feedback.double() + torch.eye(OUTPUTS)
    again = lower @ torch.block_diag(*own) @ lower.T
    torch.testing.assert_close(again, scaled, rtol=1e-5, atol=1e-6)
    # Below the tiles of the diagonal only.
    for start in range(0, OUTPUTS, TILE):
        assert not found.feedback[: start + TILE, start : start + TILE].any()


def test_a_metric_that_does_not_cross_tiles_gives_no_feedback() -> None:
    parts = [moments(TILE, seed=seed) for seed in (6, 7, 8)]
    weight = torch.randn(40, OUTPUTS, generator=torch.Generator().manual_seed(9))
    search = encoder(get_code("cc2", 8))
    scale = initial_scale(weight, search.code, search)
    outputs = output_factor(torch.block_diag(*parts), scale, TILE)
    assert outputs.feedback is not None and not outputs.feedback.any()
    feedback = factorise(moments(40, seed=2)).feedback
    found, plain = (
        encode_matrix(weight, feedback, scale, given, search, TILE)
        for given in (outputs, replace(outputs, feedback=None))
    )
    np.testing.assert_array_equal(found.words, plain.words)
    assert torch.equal(found.labels, plain.labels)
