"""The description of a quantised checkpoint: what it accepts, and what it must refuse."""

import copy
import json
from typing import Any

import pytest
import torch

from erniequant.errors import ErnieQuantError
from erniequant.packing.layer_keys import experts_module, guard_name, layer_key_of
from erniequant.packing.schema import (
    LayerSpec,
    MatrixSpec,
    QuantizationMetadata,
    layer_params,
    param_info,
)

MATRIX = {"code": "cc2", "register_length": 12, "tile": 128, "rotation_block": 64}
SETTINGS: dict[str, Any] = {
    "quant_method": "erniequant", "format_version": 1,
    "producer": {"name": "erniequant", "version": "0.1.0"},
    "layers": {"1": {"gate_up_proj": MATRIX, "down_proj": {**MATRIX, "code": "cc3", "tile": 32}}},
}  # fmt: skip


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    place = settings
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return settings


def test_round_trip_through_json() -> None:
    metadata = QuantizationMetadata.from_dict(json.loads(json.dumps(SETTINGS)))
    assert metadata.layers["1"].down_proj == MatrixSpec("cc3", 12, 32, 64)
    assert metadata.layers["1"].projection("gate_up_proj") == MatrixSpec("cc2", 12, 128, 64)
    assert metadata.to_dict() == SETTINGS


@pytest.mark.parametrize(
    ("written", "read", "again"),
    [
        ("erniequant 0.1.0", "erniequant 0.1.0", {"name": "erniequant", "version": "0.1.0"}),
        ("tests", "tests", {"name": "tests"}),
        ({"name": "someone's"}, "someone's", {"name": "someone's"}),
        ({"name": "erniequant", "version": "1", "commit": "abc"}, "erniequant 1", None),
    ],
)
def test_producers_are_mappings_and_were_texts(written: Any, read: str, again: Any) -> None:
    metadata = QuantizationMetadata.from_dict({**SETTINGS, "producer": written})
    assert metadata.producer == read
    assert again is None or metadata.to_dict()["producer"] == again


def test_the_version_follows_from_the_keys() -> None:
    layer = SETTINGS["layers"]["1"]
    dense = {**SETTINGS, "format_version": 2, "layers": {"0.mlp": layer, "11.mlp": layer}}
    metadata = QuantizationMetadata.from_dict(json.loads(json.dumps(dense)))
    assert list(metadata.layers) == ["0.mlp", "11.mlp"] and metadata.to_dict() == dense
    # Version 2 describes all that version 1 does; what needs no more is written as version 1.
    assert QuantizationMetadata.from_dict({**SETTINGS, "format_version": 2}).to_dict() == SETTINGS
    with pytest.raises(ErnieQuantError, match=r"format_version 1, but layer 0\.mlp needs 2"):
        QuantizationMetadata.from_dict({**dense, "format_version": 1})


DOWN = ("layers", "1", "down_proj")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("quant_method",), "gptq", "quant_method 'gptq'"),
        (("format_version",), 3, "format_version 3"),
        (("format_version",), 0, "format_version 0"),
        (("format_version",), "1", "format_version '1'"),
        (("format_version",), True, "format_version True"),
        (("format_version",), None, "format_version None"),
        (("layers",), None, "no layers"),
        (("layers",), {}, "no layers"),
        (("layers", "first"), {}, "layer first: not a layer index"),
        (("layers", "1.mlp.experts"), {}, "layer 1.mlp.experts: not a layer index"),
        (("layers", "1", "up_proj"), MATRIX, "layer 1: expected gate_up_proj and down_proj"),
        (DOWN, None, "layer 1: expected gate_up_proj and down_proj"),
        ((*DOWN, "tile"), None, "layer 1 down_proj: expected code"),
        # An unknown entry may change the meaning of the words.
        ((*DOWN, "permutation"), 1, "permutation"),
        ((*DOWN, "code"), "cc5", "layer 1 down_proj: unknown code 'cc5'"),
        ((*DOWN, "register_length"), 7, "no register length 7"),
        ((*DOWN, "register_length"), 12.0, "register_length 12.0 is not an integer"),
        ((*DOWN, "tile"), 16, "tile 16"),
        ((*DOWN, "tile"), 96, "tile 96"),
        ((*DOWN, "rotation_block"), 48, "rotation_block 48"),
        ((*DOWN, "rotation_block"), 256, "rotation_block 256"),
        ((*DOWN, "rotation_block"), 0, "rotation_block 0"),
    ],
)
def test_refusals_say_what_and_where(path: tuple[str, ...], value: Any, said: str) -> None:
    with pytest.raises(ErnieQuantError) as caught:
        QuantizationMetadata.from_dict(changed(path, value))
    assert said in str(caught.value)


def test_shapes_of_a_published_layer() -> None:
    # ERNIE-4.5-21B-A3B: 64 experts, hidden 2560, inner 1536. Words per row: 256 * 2 / 32 = 16.
    spec = MatrixSpec("cc2", 12, 256, 128)
    found = layer_params(64, 2560, 1536, LayerSpec(spec, spec))
    assert found == {
        "down_proj": ((1,), torch.bfloat16),
        "gate_up_proj_packed": ((64, 12, 2560 * 16), torch.int32),
        "gate_up_proj_scale": ((64, 3072, 1), torch.int16),
        "gate_up_proj_signs": ((1, 2, 80), torch.int32),
        "down_proj_packed": ((64, 10, 1536 * 16), torch.int32),
        "down_proj_scale": ((64, 2560, 1), torch.int16),
        "down_proj_signs": ((1, 1, 48), torch.int32),
    }


def test_signs_of_inputs_that_do_not_fill_words() -> None:
    info = param_info(2, 64, 40, MatrixSpec("cc3", 10, 64, 8))
    assert info["signs"][0] == (1, 1, 2)
    assert info["packed"][0] == (2, 1, 40 * 6)


def test_sequences_may_not_cross_from_gate_to_up() -> None:
    # 2 * 32 outputs are a whole tile of 64, but gate and up are not.
    wide, narrow = MatrixSpec("cc2", 12, 64, 32), MatrixSpec("cc2", 12, 32, 32)
    with pytest.raises(ErnieQuantError, match=r"layer 4 gate_up_proj: tile 64 .* 32 outputs"):
        layer_params(8, 64, 32, LayerSpec(wide, narrow), "layer 4")
    with pytest.raises(ErnieQuantError, match=r"layer 4 down_proj: rotation_block 64 .* 96 inputs"):
        layer_params(8, 64, 96, LayerSpec(narrow, MatrixSpec("cc2", 12, 32, 64)), "layer 4")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj_packed", "1"),
        ("layers.11.mlp.experts", "11"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "3"),
        ("model.language_model.layers.3.mlp.vision_moe.experts.down_proj", "3.vision_moe"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", None),
    ],
)
def test_layer_keys(name: str, key: str | None) -> None:
    assert layer_key_of(name) == key
    if key is not None:
        assert experts_module(key) in name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.1.mlp.gate_up_proj_packed", "1.mlp"),
        ("layers.11.mlp", "11.mlp"),
        ("model.layers.3.mlp.up_proj.weight", "3.mlp"),
        ("model.layers.1.mlp_norm.weight", None),
        ("model.layers.1.self_attn.q_proj.weight", None),
    ],
)
def test_layer_keys_of_dense_models(name: str, key: str | None) -> None:
    assert layer_key_of(name, dense=True) == key
    assert layer_key_of(name) is None
    if key is not None:
        assert experts_module(key) in name and "experts" not in experts_module(key)


def test_guards_have_names_of_stock_parameters() -> None:
    from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5Config, Ernie4_5MLP
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
        Ernie4_5_MoeConfig,
        Ernie4_5_MoeExperts,
    )

    with torch.device("meta"):
        mlp, experts = Ernie4_5MLP(Ernie4_5Config()), Ernie4_5_MoeExperts(Ernie4_5_MoeConfig())
    assert guard_name("3.mlp") in dict(mlp.named_parameters())
    assert guard_name("3") in dict(experts.named_parameters())
