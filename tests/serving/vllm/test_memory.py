"""Experts stay packed: a rank holds the bytes that the format says, before it answers and after."""

from pathlib import Path

import pytest

from erniequant.checkpoint import open_checkpoint
from erniequant.models.header_check import check_headers
from erniequant.packing.sharding import Share, bytes_of, share_params


def expected(folder: Path, share: Share) -> list[int]:
    layers = check_headers(open_checkpoint(folder)).layers
    return [
        bytes_of(share_params(layer.experts, layer.hidden, layer.inner, layer.spec, share))
        for layer in layers
    ]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("runs", "name", "shares"),
    [
        ("one_rank", "mixed", [Share()]),
        ("one_rank_compiled", "2 bits", [Share()]),
        ("two_ranks", "4 bits", [Share(0, 2), Share(1, 2)]),
        ("two_ranks", "experts", [Share(experts=(0, 1, 2)), Share(experts=(3, 4, 5))]),
        ("two_ranks_compiled", "2 bits", [Share(0, 2), Share(1, 2)]),
    ],
)
def test_expert_bytes_are_those_of_the_format(
    runs: str, name: str, shares: list[Share], when: str, folders: dict[str, Path],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    by_rank = request.getfixturevalue(runs)[name][when][0]
    folder = folders.get(name, folders["mixed"])
    assert len(by_rank) == len(shares)
    for found, share in zip(by_rank, shares, strict=True):
        other = found.pop("other")
        assert list(found.values()) == expected(folder, share)
        # A rank's table of experts, 4 bytes each, and no weight beside the packed ones.
        assert other <= 6 * 2 * 4 * 2


@pytest.mark.parametrize(
    ("runs", "name"), [("one_rank", "4 bits"), ("two_ranks_compiled", "2 bits")]
)
def test_answers_leave_no_decoded_copy(
    runs: str, name: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(runs)[name]
    one_expert = 3 * 96 * 64 * 4  # decoded to float32, of one rank of two
    for before, after in zip(found["before"][1], found["after"][1], strict=True):
        assert after - before < one_expert
