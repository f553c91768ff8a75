"""transformers' config of vision-language models in vLLM's terms."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from erniequant.errors import ErnieQuantError
from erniequant.serving.vllm.vision_config import FlatConfig, expert_layers, flat
from erniequant_data import tiny_vl_model_dir
from tests.micro_vl import as_baidu_releases_it, write_micro_vl


@pytest.fixture
def settings() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((tiny_vl_model_dir() / "config.json").read_text())
    return config


def test_the_flat_config_has_the_entries_of_baidus(tmp_path: Path) -> None:
    # Baidu's own config of the same weights, whose entries vLLM reads.
    folder = write_micro_vl(tmp_path / "micro")
    original = as_baidu_releases_it(folder, tmp_path / "original") / "config.json"
    found = FlatConfig(**json.loads((folder / "config.json").read_text())).to_dict()
    wanted = json.loads(original.read_text())
    # There, experts end beyond the last layer; types and names are of the other form.
    for name in ("architectures", "model_type", "torch_dtype", "rope_theta", "moe_layer_end_index"):
        wanted.pop(name)
    tower, found_tower = wanted.pop("vision_config"), found["vision_config"]
    assert {name: found[name] for name in wanted} == wanted
    assert found["rope_parameters"]["rope_theta"] == 1e4
    assert found["moe_layer_end_index"] == [2, 2]
    tower.pop("model_type")
    assert int(found_tower["hidden_size"] * found_tower["mlp_ratio"]) == 48
    assert tower.pop("mlp_ratio") == 1.5
    assert {name: found_tower[name] for name in tower} == tower


def test_any_inner_size_of_the_tower_survives_the_ratio(settings: dict[str, Any]) -> None:
    # 61 / 112 * 112 is less than 61 in floating point, for one.
    hidden = 112
    for inner in range(1, 340):
        settings["vision_config"] |= {"hidden_size": hidden, "intermediate_size": inner}
        assert int(hidden * flat(settings)["vision_config"].mlp_ratio) == inner


def test_what_config_json_leaves_out_is_transformers_default(settings: dict[str, Any]) -> None:
    text = settings["text_config"]
    for name in ("num_key_value_heads", "moe_k", "mlp_layer_types"):
        del text[name]
    found = flat(settings)
    assert (found["num_key_value_heads"], found["moe_k"]) == (4, 6)
    assert (found["moe_layer_start_index"], found["moe_layer_end_index"]) == ([1, 1], [3, 3])


def test_the_given_settings_stay_as_they_are(settings: dict[str, Any]) -> None:
    before = copy.deepcopy(settings)
    flat(settings)
    assert settings == before


@pytest.mark.parametrize(
    ("letters", "expected"),
    [("dsss", (1, 3, 1)), ("ssdd", (0, 1, 1)), ("dsdsd", (1, 3, 2)), ("ddsdds", (2, 5, 3)),
     ("dds", (2, 2, 1))],
)  # fmt: skip
def test_layers_with_experts(letters: str, expected: tuple[int, int, int]) -> None:
    types = ["sparse" if letter == "s" else "dense" for letter in letters]
    first, last, interval = expert_layers(types)
    assert (first, last, interval) == expected
    # As vLLM decides.
    assert [
        first <= index <= last and (index + 1) % interval == 0 for index in range(len(types))
    ] == [kind == "sparse" for kind in types]


@pytest.mark.parametrize("letters", ["sdds", "dssdds", "dddd"])
def test_layers_that_vllm_cannot_have(letters: str) -> None:
    types = ["sparse" if letter == "s" else "dense" for letter in letters]
    with pytest.raises(ErnieQuantError, match="mlp_layer_types"):
        expert_layers(types)


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("text_config", {"use_bias": True}, "use_bias"),
        ("text_config", {"rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                             "rope_theta": 1e4, "mrope_section": [6, 6, 4]}},
         "rope_type"),
        ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                             "mrope_section": [4, 8, 4]}}, "mrope_section"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("vision_config", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("text_config", {"hidden_size": "wide"}, "not a valid"),
    ],
)  # fmt: skip
def test_models_that_vllm_would_compute_wrongly_are_refused(
    settings: dict[str, Any], part: str, changes: dict[str, Any], named: str
) -> None:
    settings[part] |= changes
    with pytest.raises(ErnieQuantError, match=named):
        flat(settings)
