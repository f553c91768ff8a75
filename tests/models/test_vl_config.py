"""Baidu's config.json of vision-language models in terms of transformers, against what transformers
itself makes of these models."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
)

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.models.ernie45_vl import Ernie45Vl
from erniequant.models.registry import architecture_of
from erniequant.models.settings import require_possible_vision
from erniequant.models.vl_config import in_terms_of_transformers
from tests.micro_original import MICRO, RELEASED, write_original

IDS = [f"{what}_token_id" for what in (
    "image", "image_start", "image_end", "video", "video_start", "video_end"
)]  # fmt: skip


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with entries changed, those of ``vision_config`` one by one."""
    vision = changes.pop("vision", {})
    found = copy.deepcopy(settings) | changes
    found["vision_config"] = found["vision_config"] | vision
    return found


def stock(config: Any) -> Any:
    with torch.device("meta"):
        return Ernie4_5_VLMoeForConditionalGeneration(config)


@pytest.fixture(scope="module")
def defaults() -> Any:
    """transformers' defaults describe the released 28B model."""
    return Ernie4_5_VLMoeConfig()


def test_the_released_config_builds_the_released_model(defaults: Any) -> None:
    config = Ernie4_5_VLMoeConfig(**in_terms_of_transformers(RELEASED))
    expected, found = stock(defaults), stock(config)
    shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.state_dict().items()} == shapes
    assert sum(p.numel() for p in found.parameters()) == pytest.approx(29.40e9, rel=1e-3)
    assert [getattr(config, name) for name in IDS] == [getattr(defaults, name) for name in IDS]
    text, wanted = config.text_config, defaults.text_config
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]}
    assert {name: text.rope_parameters[name] for name in rope} == rope
    for part in ("text_config", "vision_config"):
        # Ids of special tokens are the only ones that transformers leaves open.
        known = getattr(defaults, part).to_dict() | {"rope_parameters": None}
        known |= {name: text.to_dict().get(name) for name in known if name.endswith("_token_id")}
        mine = getattr(config, part).to_dict() | {"rope_parameters": None}
        assert {name: mine[name] for name in known if name != "dtype"} == {
            name: value for name, value in known.items() if name != "dtype"
        }
    assert text.mlp_layer_types == wanted.mlp_layer_types == ["dense", *["sparse"] * 27]
    assert config.tie_word_embeddings is True and str(config.dtype) == "torch.bfloat16"


def test_frequencies_are_those_of_the_released_model(defaults: Any) -> None:
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
        Ernie4_5_VLMoeTextRotaryEmbedding as Rotary,
    )

    config = Ernie4_5_VLMoeConfig(**in_terms_of_transformers(RELEASED))
    # The default rope of this class takes its section from its own default.
    assert defaults.text_config.rope_parameters.get("mrope_section", [22, 22, 20]) == [22, 22, 20]
    positions = torch.tensor([[[5, 6, 7]], [[1, 2, 9]], [[3, 3, 4]]])
    for a, b in zip(
        Rotary(config.text_config)(torch.zeros(1), positions),
        Rotary(defaults.text_config)(torch.zeros(1), positions),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_converted_config_stays_as_it_is() -> None:
    settings = json.loads(Ernie4_5_VLMoeConfig().to_json_string(use_diff=False))
    assert in_terms_of_transformers(settings) is settings


def layers_with_experts(**changes: Any) -> list[int]:
    types = in_terms_of_transformers(changed(RELEASED, num_hidden_layers=8, **changes))
    kinds = types["text_config"]["mlp_layer_types"]
    assert len(kinds) == 8
    return [index for index, kind in enumerate(kinds) if kind == "sparse"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"moe_layer_end_index": [-1, -1]}, [1, 2, 3, 4, 5, 6, 7]),
        ({"moe_layer_end_index": -1, "moe_layer_start_index": 3}, [3, 4, 5, 6, 7]),
        ({"moe_layer_start_index": [4, 2], "moe_layer_end_index": [5, 6]}, [2, 3, 4, 5, 6]),
        # Every second one, counted from one: 1, 3, 5 and 7.
        ({"moe_layer_interval": 2}, [1, 3, 5, 7]),
        ({"moe_layer_interval": 3, "moe_layer_end_index": [6, 6]}, [2, 5]),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], expected: list[int]) -> None:
    assert layers_with_experts(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "entry", "expected"),
    [
        ({"moe_num_shared_experts": None}, "moe_num_shared_experts", 0),
        ({"num_key_value_heads": None}, "num_key_value_heads", 20),
        ({"head_dim": 64}, "head_dim", 64),
        ({"moe_num_experts": 32}, "moe_num_experts", 32),
        ({"moe_norm_min": 1e-9}, "moe_norm_min", 1e-9),
    ],
)
def test_odd_entries(changes: dict[str, Any], entry: str, expected: Any) -> None:
    config = Ernie4_5_VLMoeConfig(**in_terms_of_transformers(changed(RELEASED, **changes)))
    assert getattr(config.text_config, entry) == expected


@pytest.mark.parametrize(
    ("changes", "section"),
    [
        ({"freq_allocation": 24}, [20, 20, 24]),
        ({"head_dim": 64, "freq_allocation": 8}, [12, 12, 8]),
    ],
)
def test_rotations_of_height_width_and_time(changes: dict[str, Any], section: list[int]) -> None:
    model = Ernie45Vl(changed(RELEASED, **changes))
    assert model.config.rope_parameters["mrope_section"] == section
    # Heads of the size that the section is for.
    heads = model._empty_layer(0).self_attn.q_proj.weight.shape[0] // 20
    assert heads == 2 * sum(section)


def test_without_shared_experts_there_are_none() -> None:
    names = Ernie45Vl(changed(MICRO, moe_num_shared_experts=None)).required()
    assert not any("shared_experts" in name for name in names)
    assert any("shared_experts" in name for name in Ernie45Vl(MICRO).required())


REQUIRED = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "moe_k", "moe_num_experts", "moe_intermediate_size", "moe_layer_start_index",
    "moe_layer_end_index", "rope_theta", "im_patch_id", "vision_config",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_entry_is_named(name: str) -> None:
    for settings in ({k: v for k, v in RELEASED.items() if k != name}, RELEASED | {name: None}):
        with pytest.raises(ErnieQuantError, match=f"lacks {name}; restore it") as caught:
            architecture_of(settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["depth", "hidden_size", "num_heads", "patch_size"])
def test_a_missing_entry_of_the_vision_tower_is_named(name: str) -> None:
    settings = changed(RELEASED)
    del settings["vision_config"][name]
    with pytest.raises(ErnieQuantError, match=f"lacks {name} in vision_config; restore it"):
        architecture_of(settings)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"moe_num_experts": [64, 32]}, r"moe_num_experts \[64, 32\]; transformers runs only"),
    ({"moe_num_experts": [64, 64, 64]}, r"moe_num_experts \[64, 64, 64\]; expected an integer"),
    ({"moe_intermediate_size": [1536]}, r"moe_intermediate_size \[1536\]; expected an integer"),
    ({"moe_layer_end_index": "last"}, "moe_layer_end_index 'last'; expected an integer"),
    ({"moe_layer_interval": 0}, "moe_layer_interval 0; expected a positive integer"),
    ({"num_attention_heads": 0}, "num_attention_heads 0; expected a positive integer"),
    ({"num_hidden_layers": "28"}, "num_hidden_layers '28'; expected a positive integer"),
    ({"hidden_size": 2560.0}, "hidden_size 2560.0; expected a positive integer"),
    ({"rope_3d": False}, "rope_3d False"),
    ({"freq_allocation": "20"}, "freq_allocation '20'"),
    ({"freq_allocation": 21}, r"mrope_section \[21, 21, 21\]; expected \[n, n, m\] with a sum"),
    ({"freq_allocation": 64}, r"mrope_section \[0, 0, 64\]"),
    ({"head_dim": [128]}, r"head_dim \[128\]"),
    ({"moe_layer_start_index": [40, 40]}, "no layer with experts"),
    ({"vision_config": [1]}, r"vision_config \[1\]; expected an object"),
    ({"vision": {"mlp_ratio": "4"}}, "mlp_ratio '4'; expected a number"),
    ({"vision": {"hidden_size": "wide"}}, "hidden_size 'wide'; expected a positive integer"),
    ({"moe_k": 65}, "moe_k 65 of 64 experts"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_no_model_is_made_of_is_one_line(changes: dict[str, Any], message: str) -> None:
    whole = "vision_config" in changes
    settings = RELEASED | changes if whole else changed(RELEASED, **changes)
    with pytest.raises(ErnieQuantError, match=message) as caught:
        architecture_of(settings)
    assert "\n" not in str(caught.value)


Change = Callable[[Any], None]


def of_vision(name: str, value: Any) -> Change:
    return lambda config: setattr(config.vision_config, name, value)


def of_text(name: str, value: Any) -> Change:
    return lambda config: setattr(config.text_config, name, value)


def of_section(value: Any) -> Change:
    def change(config: Any) -> None:
        config.text_config.rope_parameters = {"rope_type": "default", "mrope_section": value}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (of_vision(name, value), f"{name} {value!r} in vision_config; expected a positive")
            for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels",
                         "patch_size", "spatial_merge_size")
            for value in (0, -1, None, 1.5, True)
        ),
        (of_vision("num_heads", 15), "15 heads for 1280 channels"),
        # 1280 / 640 is 2, and half of a head's rotations is for height.
        (of_vision("num_heads", 640), "must be a multiple of 4"),
        (of_vision("temporal_merge_size", 3), "temporal_merge_size 3; transformers runs 2 only"),
        (of_vision("hidden_act", "sigmoidal"), "hidden_act 'sigmoidal'; unknown"),
        (of_text("mlp_layer_types", ["sparse"] * 27), "of length 27; .* each of 28 layers"),
        (of_text("mlp_layer_types", ["sparse"] * 27 + ["other"]), "expected dense or sparse"),
        (of_section([22, 22, 21]), r"mrope_section \[22, 22, 21\]; .* with a sum of 64"),
        (of_section([20, 24, 20]), r"mrope_section \[20, 24, 20\]; expected \[n, n, m\]"),
        (of_section([32, 32, 0]), r"mrope_section \[32, 32, 0\]"),
        (of_section([0, 0, 64]), r"mrope_section \[0, 0, 64\]"),
        (of_section([44, 20]), r"mrope_section \[44, 20\]"),
        (of_section("22"), "mrope_section '22'"),
        (of_section([22.0, 22.0, 20.0]), "mrope_section"),
        (lambda c: setattr(c, "image_token_id", 101304), "different ids below 103424"),
        (lambda c: setattr(c, "image_end_token_id", 103424), "different ids below 103424"),
        (lambda c: setattr(c, "image_start_token_id", -1), "different ids below 103424"),
        (lambda c: setattr(c, "image_token_id", "100295"), "different ids below 103424"),
    ],
)  # fmt: skip
def test_bad_values_beside_the_decoder_are_one_line(change: Change, message: str) -> None:
    config = Ernie4_5_VLMoeConfig()
    require_possible_vision(config)
    # transformers checks types at assignment; what comes from a file may get past it.
    plain = Plain(config)
    change(plain)
    with pytest.raises(ErnieQuantError, match=message) as caught:
        require_possible_vision(plain)
    assert "\n" not in str(caught.value)


class Plain:
    """A config without transformers' checks."""

    def __init__(self, config: Any):
        for name, value in vars(config).items():
            part = name in ("text_config", "vision_config")
            setattr(self, name, Plain(value) if part else value)


def test_a_micro_model_computes_the_same_in_both_forms(tmp_path: Path) -> None:
    published = write_original(tmp_path / "published", tmp_path / "converted")
    model, _ = erniequant.load(published, device="cpu", dtype="float32")
    expected, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "converted", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.tensor([[12, 13, 7, 6, 6, 6, 6, 8, 40, 41, 42]])
    types = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    placeholder = (ids == 6).long()
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": placeholder,
        "moe_mm_token_type_ids": types, "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values": torch.randn(16, 48, generator=generator),
    }  # fmt: skip
    with torch.no_grad():
        found, wanted = model(**batch).logits, expected(**batch).logits
        assert torch.equal(found, wanted)
        # Of 96 / 4 / 2 rotations, 4 are for time in both; all of them for one would show.
        model.model.language_model.rotary_emb.mrope_section = [5, 5, 2]
        assert not torch.equal(model(**batch).logits, wanted)
