"""Spreads and ratios against values found by hand; the triad against its definition."""

import pytest
import torch

from erniequant.timing import Spread, extremes, quartiles, triad, triad_bytes, turn_ratios


def test_spreads():
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert quartiles(values) == Spread(3.0, low=2.0, high=4.0)
    assert extremes(values) == Spread(3.0, low=1.0, high=5.0)


def test_above_one_ours_is_faster():
    assert turn_ratios([3.0, 6.0], [1.0, 12.0]) == [3.0, 0.5]
    with pytest.raises(ValueError):
        turn_ratios([1.0], [1.0, 2.0])


def test_the_triad_reads_and_writes_what_it_counts():
    out = triad(1000, torch.device("cpu"))()
    assert triad_bytes(1000) == 3 * out.nbytes and bool((out == 4).all())
