"""A change of structure is no change of results: small quantisations write the bytes on record."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.quantization.same_bytes import RECORD, surroundings, written

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shards_are_those_on_record(tmp_path: Path) -> None:
    """`python -m tests.quantization.same_bytes` adds surroundings that are not on record. There,
    runs and shards are compared; a repetition of all would say nothing about a change."""
    recorded = json.loads(RECORD.read_text())
    found = written(tmp_path)
    expected = recorded.get(surroundings())
    if expected is not None:
        assert found == expected
    some = next(iter(recorded.values()))
    assert {name: list(shards) for name, shards in found.items()} == {
        name: list(shards) for name, shards in some.items()
    }
    with safe_open(tmp_path / "2 bits result/model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.down_proj_packed" in set(file.keys())
