"""config.json: read as FastDeploy's own code reads it, strictly by us."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.config import (
    choose_k_order,
    fastdeploy_config,
    is_fastdeploy_wint2,
    plain_config,
    read_settings,
)
from erniequant.formats.fastdeploy.sizes import fastdeploy_model, text_moe
from tests.fastdeploy.test_schema import CONFIG_21B


def written(source: dict[str, Any], w4_end: int = 3, ranks: int = 2) -> dict[str, Any]:
    architecture = text_moe(source)
    model = fastdeploy_model(architecture, w4_end, ranks)
    return json.loads(json.dumps(fastdeploy_config(source, architecture, model, "plain")))


def seen_by_fastdeploy(config: dict[str, Any]) -> dict[str, Any]:
    """The attributes that fastdeploy/config.py ends up with, as far as they matter."""
    defaults = dict(rope_theta=10000.0, moe_num_shared_experts=0, moe_layer_start_index=0,
                    moe_use_aux_free=False, tie_word_embeddings=False, rms_norm_eps=1e-5,
                    moe_num_experts=None)  # fmt: skip
    found = defaults | config
    found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    if "torch_dtype" in config:
        found["model_format"] = "error" if "dtype" in config else "torch"
    else:
        newer = config.get("transformers_version", "0") > "4.56.0"
        found["model_format"] = "torch" if newer else "paddle"
    quantization = config["quantization_config"]
    moe = quantization.get("moe_quant_config", {})
    found["name"] = quantization["quantization"]
    found["moe_quant_type"] = moe.get("quant_type", "w4w2")
    found["w4_end"] = moe.get("moe_w4_quant_config", {}).get("quant_end_layer", 6)
    return found


@pytest.mark.parametrize("torch_dtype", [True, False])
def test_fastdeploy_sees_the_same_model(torch_dtype: bool) -> None:
    old = {"torch_dtype": "bfloat16"}
    new = {"dtype": "bfloat16", "transformers_version": "5.16.0"}
    # transformers 5 moves rope_theta away from where FastDeploy looks.
    source = CONFIG_21B | (old if torch_dtype else new)
    if not torch_dtype:
        source["rope_parameters"] = {"rope_theta": source.pop("rope_theta")}
    found = seen_by_fastdeploy(written(source))
    for name in CONFIG_21B:
        assert found[name] == CONFIG_21B[name], name
    assert found["model_format"] == "paddle" and found["dtype"] == "bfloat16"
    assert (found["name"], found["moe_quant_type"], found["w4_end"]) == ("wint2", "w4w2", 3)
    assert found["is_quantized"] is True and found["moe_use_aux_free"] is True
    assert found["architectures"] == ["Ernie4_5_MoeForCausalLM"]


def test_values_that_transformers_leaves_out_are_written() -> None:
    source = {k: v for k, v in CONFIG_21B.items() if k not in ("head_dim", "tie_word_embeddings")}
    found = seen_by_fastdeploy(written(source | {"hidden_size": 2560}))
    # transformers ties by default, FastDeploy does not.
    assert found["tie_word_embeddings"] is True and found["head_dim"] == 128


def test_settings_come_back() -> None:
    config = written(CONFIG_21B)
    assert is_fastdeploy_wint2(config) and not is_fastdeploy_wint2(CONFIG_21B)
    settings = read_settings(config)
    assert (settings.w4_end_layer, settings.k_order, settings.tensor_parallel) == (3, "plain", 2)
    assert settings.producer is not None and settings.producer.startswith("erniequant")
    assert read_settings(written(CONFIG_21B, w4_end=-1)).w4_end_layer == -1


def test_settings_of_others() -> None:
    found = read_settings({"quantization_config": {"quantization": "wint2"}})
    # FastDeploy's default, and no record of ours.
    assert (found.w4_end_layer, found.k_order, found.tensor_parallel) == (6, None, None)


Edit = Callable[[dict[str, Any]], Any]


def moe(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["moe_quant_config"]
    return found


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c["quantization_config"].update(quantization="wint4"), "no FastDeploy WINT2"),
        (lambda c: c["quantization_config"].update(dense_quant_type="wint4"), "dense_quant_type"),
        (lambda c: moe(c).update(quant_type="w4a8"), "quant_type 'w4a8'"),
        (lambda c: moe(c)["moe_w4_quant_config"].update(quant_type="w4a8"), "only 'wint4'"),
        (lambda c: moe(c)["moe_w2_quant_config"].update(quant_group_size=128), "quant_group_size"),
        (lambda c: moe(c)["moe_w4_quant_config"].update(quant_end_layer="6"), "quant_end_layer"),
        (lambda c: moe(c)["moe_w4_quant_config"].update(quant_end_layer=True), "quant_end_layer"),
        (lambda c: moe(c).update(moe_w4_quant_config=[]), "expected an object"),
        (lambda c: c["quantization_config"].update(moe_quant_config=3), "expected an object"),
        (lambda c: c["erniequant"].update(k_order="mma32"), "k_order 'mma32'"),
        (lambda c: c["erniequant"].update(k_order=["plain"]), "k_order"),
        (lambda c: c["erniequant"].update(tensor_parallel=0), "tensor_parallel"),
        (lambda c: c.update(erniequant="plain"), "expected an object"),
    ],
)
def test_settings_that_cannot_be_read(edit: Edit, match: str) -> None:
    config = written(CONFIG_21B)
    edit(config)
    with pytest.raises(ErnieQuantError, match=match):
        read_settings(config)


def test_the_record_and_what_is_given_must_agree() -> None:
    assert choose_k_order(None, None) is None
    assert choose_k_order("plain", None) == choose_k_order(None, "plain") == "plain"
    assert choose_k_order("mma64", "mma64") == "mma64"
    with pytest.raises(ErnieQuantError, match="plain was given, .* has mma64"):
        choose_k_order("mma64", "plain")
    with pytest.raises(ErnieQuantError, match="no k_order 'other'"):
        choose_k_order(None, "other")


def test_a_plain_config_is_one_of_transformers(fd_single: Path) -> None:
    from transformers import Ernie4_5_MoeConfig

    plain = plain_config(json.loads((fd_single / "config.json").read_text()), "float32")
    config = Ernie4_5_MoeConfig(**plain)
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.num_experts == 4 and config.num_experts_per_tok == 2
    assert plain["dtype"] == "float32" and "quantization_config" not in plain
