"""vLLM says about quantised checkpoints what transformers says, packed, on one rank and two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.vllm.harness import TOLERANCE, case, differences, distance, run_engines

VISIBLE = 0.1


def agrees(found: dict[str, Any], model: Any) -> None:
    for said in found["said"]:
        assert len(said["tokens"]) == 16
        assert distance(said, model) <= TOLERANCE


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
