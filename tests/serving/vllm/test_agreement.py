"""vLLM says about quantised checkpoints what transformers says, on one rank and two, and experts
stay packed: a rank holds the bytes that the format says, before it answers and after.

One file, so that one worker has the engines.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erniequant.checkpoint import open_checkpoint
from erniequant.models.header_check import check_headers
from erniequant.packing.sharding import Share, bytes_of, share_params
from tests.serving.vllm.harness import agrees, case, differences, run_engines

VISIBLE = 0.1


@pytest.mark.parametrize(
    "name", ["2 bits", "4 bits", "mixed", "partly", "no bias", "dense", "dense plain", "plain"]
)
def test_one_rank(name: str, one_rank: dict[str, Any], reference: Callable[[str], Any]) -> None:
    agrees(one_rank[name], reference(name))


@pytest.mark.parametrize("name", ["2 bits", "dense"])
def test_one_rank_compiled(
    name: str, one_rank_compiled: dict[str, Any], reference: Callable[[str], Any]
) -> None:
    agrees(one_rank_compiled[name], reference(name))


@pytest.mark.parametrize("name", ["4 bits", "dense"])
def test_two_ranks(name: str, two_ranks: dict[str, Any], reference: Callable[[str], Any]) -> None:
    agrees(two_ranks[name], reference(name))


def test_experts_divided_among_two_ranks(
    two_ranks: dict[str, Any], reference: Callable[[str], Any]
) -> None:
    agrees(two_ranks["experts"], reference("mixed"))


def test_two_ranks_compiled(
    two_ranks_compiled: dict[str, Any], reference: Callable[[str], Any]
) -> None:
    agrees(two_ranks_compiled["2 bits"], reference("2 bits"))


@pytest.mark.parametrize("name", ["scales", "experts", "signs"])
def test_what_is_disturbed_shows(name: str, one_rank: dict[str, Any]) -> None:
    assert differences(one_rank[name], one_rank["mixed"]) >= VISIBLE


def test_vllm_alone_still_ignores_the_correction_bias(
    folders: dict[str, Path], one_rank: dict[str, Any], tmp_path: Path
) -> None:
    """When this fails, vLLM routes as it should and `cpu_repairs` can go."""
    alone = run_engines(tmp_path / "alone", case("plain", folders["plain"]), VLLM_PLUGINS="")
    assert differences(alone["plain"], one_rank["plain"]) >= VISIBLE


def test_another_model_runs_with_the_plugin(one_rank: dict[str, Any]) -> None:
    assert len(one_rank["llama"]["said"][0]["tokens"]) == 16


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
