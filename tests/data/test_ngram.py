"""The yardstick is a probability model: it sums to one and matches a hand-computed case."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import erniequant_data

BUILD = Path(erniequant_data.__file__).parents[1] / "build"


@pytest.fixture
def ngram(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BUILD))
    return importlib.import_module("ngram")


def test_probabilities_sum_to_one_after_any_context(ngram: ModuleType) -> None:
    vocabulary = 7
    stream = np.random.default_rng(3).integers(0, 5, 400)  # 5 and 6 are never seen
    model = ngram.KneserNey([stream], vocabulary)
    for context in ([0, 1], [4, 4], [5, 1], [6, 6]):  # seen, and unseen in part or wholly
        each = [
            model.log_probabilities(np.array([*context, last]), (0.4, 0.6, 0.8))[0]
            for last in range(vocabulary)
        ]
        assert np.exp(each).sum() == pytest.approx(1.0, abs=1e-12)


def test_hand_computed_value(ngram: ModuleType) -> None:
    """Stream 0 1 2 0 1 3: p(2 | 0 1) with discount 0.5 in every order, by the definition.

    3-grams 012 120 201 013; continuation pairs 12, 20, 01, 13 once each; ends 2, 0, 1, 3 once each.
    p1(2) = (1 - .5)/4 + .5*4/4 * 1/4 = 1/4; p2(2|1) = (1 - .5)/2 + .5*2/2 * 1/4 = 3/8;
    p3(2|01) = (1 - .5)/2 + .5*2/2 * 3/8 = 7/16.
    """
    model = ngram.KneserNey([np.array([0, 1, 2, 0, 1, 3])], 4)
    value = model.log_probabilities(np.array([0, 1, 2]), (0.5, 0.5, 0.5))[0]
    assert np.exp(value) == pytest.approx(7 / 16)
