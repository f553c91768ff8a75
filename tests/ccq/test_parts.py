"""Code books, factor, searches and scales of the WINT2 encoder, each against its definition."""

import numpy as np
import pytest
import torch

from erniequant.codes.ccq.decode import decode_wint2
from erniequant.codes.ccq.order import stored_rows, to_natural
from erniequant.formats.fastdeploy.ccq.books import BOOKS, book_labels, is_exact
from erniequant.formats.fastdeploy.ccq.candidates import Plan, dry_run, race
from erniequant.formats.fastdeploy.ccq.encode import common_unit
from erniequant.formats.fastdeploy.ccq.factor import (
    diagonal_blocks,
    encoding_order,
    factorise_blocks,
    ordinary_energy,
    roots,
)
from erniequant.formats.fastdeploy.ccq.search import encode_group, improve_group


def moments_of(inputs: int, seed: int = 0) -> torch.Tensor:
    """Second moments of correlated inputs, mean diagonal 1."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(4 * inputs, inputs, generator=generator) @ mix
    found = x.T @ x
    return found / found.diagonal().mean()


def test_books_do_not_depend_on_how_arithmetic_rounds() -> None:
    assert len(set(BOOKS)) == len(BOOKS)
    assert all(is_exact(book) for book in BOOKS)
    # A product that float32 rounds, a sum that it rounds, a negative word.
    for bad in ((117.578123, 30), (32767.0625, 0), (16000.25, 2**22), (100, -101)):
        assert not is_exact(bad)


def test_labels_of_books_are_what_the_decoder_makes_of_every_byte() -> None:
    labels = book_labels(BOOKS)
    ones = torch.ones(len(BOOKS), dtype=torch.bfloat16)
    scale, zero = torch.tensor(BOOKS, dtype=torch.float32).T
    everything = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, len(BOOKS))
    nibbles = torch.full((8, len(BOOKS)), 0x11, dtype=torch.uint8)
    decoded = decode_wint2(everything, nibbles, ones, scale.contiguous(), zero.contiguous())
    expected = decoded.unflatten(0, (256, 4)).permute(2, 1, 0)
    assert np.array_equal(labels, expected.numpy())


@pytest.mark.parametrize("k_order", ["plain", "mma64"])
def test_stored_rows_and_their_inverse(k_order: str) -> None:
    rows = stored_rows(192, k_order)
    for p in range(192):
        a, b, c = p % 64 // 16, p % 16 // 2, p % 2
        k = p if k_order == "plain" else p // 64 * 64 + 8 * b + 2 * a + c
        assert rows[p] == k
    natural = torch.randn(192, 3)
    assert torch.equal(to_natural(natural[rows], k_order), natural)


@pytest.mark.parametrize("k_order", ["plain", "mma64"])
def test_encoding_order_keeps_blocks_and_puts_energy_last(k_order: str) -> None:
    energy = torch.rand(256, generator=torch.Generator().manual_seed(1))
    order = encoding_order(energy, k_order)
    assert torch.equal(order.sort().values, torch.arange(256))
    stored = {tuple(block) for block in stored_rows(256, k_order).view(-1, 4).tolist()}
    assert {tuple(block) for block in order.view(-1, 4).tolist()} == stored
    groups = energy[order].view(4, 64)
    assert torch.equal(order.view(4, 64).sort(1).values % 64, torch.arange(64).expand(4, 64))
    assert (groups.sum(1).diff() >= 0).all()
    assert (groups.view(4, 16, 4).sum(2).diff(dim=1) >= 0).all()


def test_the_factor_gives_the_hessian_back() -> None:
    hessian = moments_of(128)
    factor = factorise_blocks(hessian)
    assert factor.damping == 0.03 and factor.fallback is None
    unit = factor.feedback.double()
    again = unit @ torch.block_diag(*factor.local) @ unit.T
    torch.testing.assert_close(
        again, hessian.double() + factor.ridge * torch.eye(128), rtol=1e-5, atol=1e-5
    )
    own = diagonal_blocks(factor.feedback)
    torch.testing.assert_close(own, torch.eye(4).expand(32, 4, 4), rtol=0, atol=1e-6)
    assert torch.equal(factor.feedback.triu(4), torch.zeros(128, 128))
    root = roots(factor.local).double()
    torch.testing.assert_close(root.mT @ root, factor.local, rtol=1e-5, atol=1e-5)


def test_massive_inputs_do_not_damp_the_others() -> None:
    hessian = moments_of(128)
    plain = ordinary_energy(hessian.diagonal())
    assert plain == pytest.approx(1)
    hessian[7] *= 1000
    hessian[:, 7] *= 1000
    median = float(hessian.diagonal().median())
    massive = ordinary_energy(hessian.diagonal())
    assert plain < massive < plain + 10 * median / 128
    assert factorise_blocks(hessian).ridge == pytest.approx(0.03 * massive)
    # Where most inputs never occur there is no median to go by.
    assert ordinary_energy(torch.tensor([0.0, 0, 0, 8])) == 2


def test_hessians_that_cannot_be_factored_give_no_feedback() -> None:
    for hessian in (torch.zeros(128, 128), torch.full((128, 128), torch.nan)):
        factor = factorise_blocks(hessian)
        assert factor.fallback == "no usable Hessian"
        assert torch.equal(factor.feedback, torch.eye(128))
    indefinite = torch.eye(128)
    indefinite[0, 0] = -200
    indefinite[1, 1] = 400
    factor = factorise_blocks(indefinite)
    assert factor.fallback is not None and factor.damping == 1.0
    assert (torch.linalg.eigvalsh(factor.local) > 0).all()


def plain_loss(error: np.ndarray, aim: np.ndarray, weight: np.ndarray, plan: Plan) -> float:
    """Loss of one group by definition, from its errors ``[64]``."""
    feedback, total = plan.factor.feedback.double().numpy(), 0.0
    for b in range(16):
        block, later = slice(4 * b, 4 * b + 4), slice(4 * b + 4, 64)
        missed = aim[block] - weight[block] + error[block] + feedback[later, block].T @ error[later]
        total += missed @ plan.factor.local[b].numpy() @ missed
    return total


def test_a_group_is_encoded_by_the_plain_recursion() -> None:
    books, outputs = BOOKS[:3], 6
    plan = Plan.of(factorise_blocks(moments_of(64)), books)
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((outputs, 64)).astype(np.float32)
    aim = weight + 0.2 * rng.standard_normal((outputs, 64)).astype(np.float32)
    book = np.arange(outputs) % 3
    unit = np.full(outputs, 1 / 180, np.float32)
    codes, nibbles = np.zeros((outputs, 16), np.uint8), np.zeros(outputs, np.uint8)
    error, loss = np.zeros((outputs, 64), np.float32), np.zeros(outputs)
    feedback = plan.factor.feedback.numpy()
    first, tries = np.full(outputs, 11), 5
    encode_group(
        weight, aim, feedback, plan.roots.numpy(), plan.points(plan.roots), book_labels(books),
        book, unit, first, tries, codes, nibbles, error, loss,
    )  # fmt: skip
    local, labels = plan.factor.local.numpy(), book_labels(books)
    for n in range(outputs):
        results = []
        for nibble in range(9, 14):
            e, scale = np.zeros(64), float(unit[n]) * nibble
            chosen = []
            for b in reversed(range(16)):
                block = slice(4 * b, 4 * b + 4)
                wanted = aim[n, block] + feedback[4 * b + 4 :, block].T @ e[4 * b + 4 :]
                missed = wanted[:, None] - scale * labels[book[n]]
                code = int(np.einsum("ic,ij,jc->c", missed, local[b], missed).argmin())
                e[block] = weight[n, block] - scale * labels[book[n], :, code]
                chosen.append(code)
            results.append((plain_loss(e, aim[n], weight[n], plan), nibble, chosen[::-1], e))
        best = min(results, key=lambda found: found[0])
        assert loss[n] == pytest.approx(best[0], rel=1e-4)
        assert nibbles[n] == best[1] and codes[n].tolist() == best[2]
        np.testing.assert_allclose(error[n], best[3], atol=1e-5)


def test_improving_a_group_is_descent_to_a_minimum() -> None:
    books, outputs = BOOKS[:2], 8
    hessian = moments_of(64, seed=4)
    plan = Plan.of(factorise_blocks(hessian), books)
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((outputs, 64)).astype(np.float32)
    book, unit = np.arange(outputs) % 2, np.full(outputs, 1 / 200, np.float32)
    nibbles = np.full(outputs, 8, np.uint8)
    codes = rng.integers(0, 256, (outputs, 16)).astype(np.uint8)
    labels = book_labels(books)

    def errors(codes: np.ndarray, nibbles: np.ndarray) -> np.ndarray:
        values = labels[book[:, None], :, codes].reshape(outputs, 64)
        return (weight - values * (unit * nibbles)[:, None]).astype(np.float32)

    def losses(error: np.ndarray) -> np.ndarray:
        return np.einsum("ni,ij,nj->n", *(x.astype(np.float64) for x in (error, h, error)))

    h, error = hessian.numpy(), errors(codes, nibbles)
    forms = diagonal_blocks(hessian).double()
    metric, inverses = roots(forms), torch.linalg.inv(forms).float().contiguous().numpy()
    before = losses(error)
    for _ in range(12):
        improve_group(
            weight, error @ h, h, metric.numpy(), inverses, plan.points(metric), labels, book,
            unit, codes, nibbles, error,
        )  # fmt: skip
        np.testing.assert_allclose(error, errors(codes, nibbles), atol=1e-5)
        after = losses(error)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    # Scales started a third too small.
    assert nibbles.min() >= 9 and nibbles.max() <= 14
    for n in range(outputs):
        for b in range(16):
            for code in range(256):
                tried = codes.copy()
                tried[n, b] = code
                assert losses(errors(tried, nibbles))[n] >= before[n] * (1 - 1e-3)


def test_racing_loses_little_against_trying_all_books() -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(24, 256, generator=generator)
    factor = factorise_blocks(moments_of(256, seed=7))
    unit = torch.full((24,), 1 / 190)
    plan = Plan.of(factor, BOOKS)
    losses = dry_run(plan, weight, 3).losses
    raced = race(plan, weight, unit, losses, 3)
    assert torch.equal(raced.output, torch.arange(24))
    alone = torch.stack([race(Plan.of(factor, (b,)), weight, unit, losses, 3).loss for b in BOOKS])
    assert (raced.loss >= alone.amin(0) * (1 - 1e-6)).all()
    assert raced.loss.sum() < 1.02 * alone.amin(0).sum()
    # Choosing is worth it.
    assert raced.loss.sum() < 0.95 * alone.sum(1).min()
    for n in range(24):
        assert raced.loss[n] == pytest.approx(float(alone[raced.book[n], n]), rel=1e-5)


def test_one_unit_for_the_scales_of_all_groups() -> None:
    scales = torch.tensor(
        [[12.0, 11, 13, 9], [1.5, 0.1, 0.2, 1.4], [0, 0, 0, 0], [3e-38, 1e-38, 0, 3e-38]]
    )
    unit = common_unit(scales)
    assert unit[2] == 0 and torch.isfinite(unit).all()
    nibbles = (scales[:2] / unit[:2, None]).round().clamp(1, 15)
    assert (nibbles * unit[:2, None] / scales[:2] - 1).abs().max() < 0.05
    assert nibbles.max() >= 8
