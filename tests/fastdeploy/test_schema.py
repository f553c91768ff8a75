"""The keys, against a list written from FastDeploy's loader; every kind of damage is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy import check_folder, open_fastdeploy
from erniequant.formats.fastdeploy.names import rank_keys
from erniequant.formats.fastdeploy.schema import check_keys
from erniequant.formats.fastdeploy.sizes import FastDeployModel, fastdeploy_model, text_moe

U8, I8 = torch.uint8, torch.int8
BF16, F32 = torch.bfloat16, torch.float32

# baidu/ERNIE-4.5-21B-A3B-PT and ERNIE-4.5-300B-A47B-PT.
CONFIG_21B: dict[str, Any] = dict(
    model_type="ernie4_5_moe", hidden_size=2560, intermediate_size=12288, num_hidden_layers=28,
    num_attention_heads=20, num_key_value_heads=4, head_dim=128, vocab_size=103424,
    moe_num_experts=64, moe_k=6, moe_intermediate_size=1536, moe_num_shared_experts=2,
    moe_layer_start_index=1, moe_layer_end_index=27, tie_word_embeddings=True, hidden_act="silu",
    max_position_embeddings=131072, rope_theta=500000.0, use_bias=False,
)  # fmt: skip
CONFIG_300B: dict[str, Any] = CONFIG_21B | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=54, num_attention_heads=64,
    num_key_value_heads=8, moe_k=8, moe_intermediate_size=3584, moe_num_shared_experts=0,
    moe_layer_start_index=3, moe_layer_end_index=53, tie_word_embeddings=False,
)  # fmt: skip


def model_of(config: dict[str, Any], w4_end: int = -1, ranks: int = 1) -> FastDeployModel:
    return fastdeploy_model(text_moe(config), w4_end, ranks)


def loaders_list(config: dict[str, Any], w4_end: int, ranks: int) -> dict[str, Any]:
    """What each layer of FastDeploy pops, with the shape and dtype of its parameter on a rank."""
    hidden, experts = config["hidden_size"], config["moe_num_experts"]
    inner = config["moe_intermediate_size"] // ranks
    size = config["head_dim"]
    queries = config["num_attention_heads"] * size // ranks
    keys = config["num_key_value_heads"] * size // ranks
    found: dict[str, Any] = {}

    def wint8(prefix: str, outputs: int, inputs: int) -> None:
        found[f"{prefix}.quant_weight"] = ((outputs, inputs), I8)
        found[f"{prefix}.weight_scale"] = ((outputs,), BF16)

    def expert(prefix: str, outputs: int, inputs: int, wint4: bool) -> None:
        if wint4:
            found[f"{prefix}.quant_weight"] = ((outputs // 2, inputs), I8)
            found[f"{prefix}.weight_scale"] = ((outputs,), BF16)
            return
        found[f"{prefix}.quant_weight"] = ((inputs // 4, outputs), U8)
        found[f"{prefix}.weight_scale"] = ((inputs // 128, outputs), U8)
        found[f"{prefix}.super_scales"] = ((outputs,), BF16)
        found[f"{prefix}.code_scale"] = found[f"{prefix}.code_zp"] = ((outputs,), F32)

    found["ernie.embed_tokens.weight"] = ((config["vocab_size"] // ranks, hidden), BF16)
    found["ernie.norm.weight"] = ((hidden,), BF16)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = ((hidden, config["vocab_size"] // ranks), BF16)
    for i in range(config["num_hidden_layers"]):
        layer = f"ernie.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = ((hidden,), BF16)
        found[f"{layer}.post_attention_layernorm.weight"] = ((hidden,), BF16)
        wint8(f"{layer}.self_attn.qkv_proj", queries + 2 * keys, hidden)
        wint8(f"{layer}.self_attn.o_proj", hidden, queries)
        if i < config["moe_layer_start_index"]:
            dense = config["intermediate_size"] // ranks
            wint8(f"{layer}.mlp.up_gate_proj", 2 * dense, hidden)
            wint8(f"{layer}.mlp.down_proj", hidden, dense)
            continue
        found[f"{layer}.mlp.gate.weight"] = ((hidden, experts), F32)
        found[f"{layer}.mlp.moe_statics.e_score_correction_bias"] = ((1, experts), F32)
        if config["moe_num_shared_experts"]:
            shared = config["moe_num_shared_experts"] * inner
            wint8(f"{layer}.mlp.shared_experts.up_gate_proj", 2 * shared, hidden)
            wint8(f"{layer}.mlp.shared_experts.down_proj", hidden, shared)
        for e in range(experts):
            expert(f"{layer}.mlp.experts.{e}.up_gate_proj", 2 * inner, hidden, i <= w4_end)
            expert(f"{layer}.mlp.experts.{e}.down_proj", hidden, inner, i <= w4_end)
    return found


@pytest.mark.parametrize("config", [CONFIG_21B, CONFIG_300B], ids=["21B", "300B"])
@pytest.mark.parametrize(("w4_end", "ranks"), [(-1, 1), (3, 2), (6, 4)])
def test_keys_of_published_models(config: dict[str, Any], w4_end: int, ranks: int) -> None:
    expected = loaders_list(config, w4_end, ranks)
    assert rank_keys(model_of(config, w4_end, ranks)) == expected


def test_some_shapes_of_the_21b_model_in_figures() -> None:
    keys = rank_keys(model_of(CONFIG_21B, w4_end=1))
    expert = "ernie.layers.5.mlp.experts.63"
    assert keys[f"{expert}.up_gate_proj.quant_weight"] == ((640, 3072), U8)
    assert keys[f"{expert}.up_gate_proj.weight_scale"] == ((20, 3072), U8)
    assert keys[f"{expert}.down_proj.quant_weight"] == ((384, 2560), U8)
    assert keys["ernie.layers.1.mlp.experts.0.up_gate_proj.quant_weight"] == ((1536, 2560), I8)
    assert keys["ernie.layers.0.self_attn.qkv_proj.quant_weight"] == ((3584, 2560), I8)
    assert keys["ernie.layers.0.mlp.down_proj.quant_weight"] == ((2560, 12288), I8)
    assert "lm_head.weight" not in keys


@pytest.mark.parametrize(
    ("config", "ranks", "match"),
    [
        (CONFIG_300B, 8, "moe_intermediate_size is 3584; cut for 8 ranks .* multiple of 1024"),
        (CONFIG_21B, 3, "moe_intermediate_size is 1536|num_attention_heads"),
        (CONFIG_21B | dict(num_attention_heads=18, num_key_value_heads=2), 4, "num_attention"),
        (CONFIG_21B, 0, "at least 1 rank"),
        (CONFIG_21B | dict(hidden_size=2496), 1, "hidden_size 2496; .* multiple of 128"),
        (CONFIG_21B | dict(moe_intermediate_size=1600), 1, "1600; FastDeploy needs .* of 128"),
        (CONFIG_21B | dict(intermediate_size=12300), 1, "intermediate_size is 12300"),
        (CONFIG_21B | dict(vocab_size=103425), 1, "vocab_size 103425"),
        (CONFIG_21B | dict(use_bias=True), 1, "use_bias"),
        (CONFIG_21B | dict(hidden_act="gelu"), 1, "hidden_act"),
        (CONFIG_21B | dict(moe_layer_end_index=20), 1, r"layers 1\.\.20 \(20 of them\)"),
        (CONFIG_21B | dict(moe_layer_interval=9), 1, r"layers \(8, 17, 26\)"),
        (CONFIG_21B | dict(rope_parameters=dict(rope_theta=1e4, rope_type="linear", factor=2.0)),
         1, "rope_type 'linear'"),
    ],
)  # fmt: skip
def test_models_that_fastdeploy_cannot_serve(
    config: dict[str, Any], ranks: int, match: str
) -> None:
    with pytest.raises(ErnieQuantError, match=match):
        model_of(config, ranks=ranks)


def test_an_inner_size_of_the_dense_layer_counts_only_where_there_is_one() -> None:
    assert model_of(CONFIG_21B | dict(moe_layer_start_index=0, intermediate_size=12300))


def test_other_kinds_of_models(micro_vl: Path) -> None:
    config = json.loads((micro_vl / "config.json").read_text())
    with pytest.raises(ErnieQuantError, match="text mixtures of experts only"):
        text_moe(config)


def test_what_we_write_is_what_the_loader_asks_for(fd_single: Path, fd_ranks: Path) -> None:
    assert check_folder(fd_single) == () and check_folder(fd_ranks) == ()


Edit = Callable[[dict[str, torch.Tensor]], Any]
EXPERT = "ernie.layers.2.mlp.experts.1.down_proj"
SCALE = "ernie.layers.2.mlp.shared_experts.down_proj.weight_scale"
BIAS = "ernie.layers.2.mlp.moe_statics.e_score_correction_bias"


def damaged(folder: Path, copy: Path, edit: Edit) -> Path:
    """A copy of a single folder in one file, after an edit of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    edit(tensors)
    copy.mkdir()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "np", "k_order": "mma64"})
    (copy / "config.json").write_text((folder / "config.json").read_text())
    return copy


def changed(name: str, tensor: torch.Tensor) -> Edit:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda t: t.pop(f"{EXPERT}.code_zp"), f"tensor {EXPERT}.code_zp is missing"),
        (lambda t: t.update({f"{EXPERT}.super_scale": t.pop(f"{EXPERT}.super_scales")}),
         f"tensor {EXPERT}.super_scales is missing"),
        (changed("ernie.extra", torch.zeros(1)), "tensor ernie.extra is not one that FastDeploy"),
        (changed(f"{EXPERT}.quant_weight", torch.zeros(64, 384, dtype=I8)),
         f"tensor {EXPERT}.quant_weight has dtype I8, expected uint8"),
        (changed(f"{EXPERT}.quant_weight", torch.zeros(384, 64, dtype=U8)),
         f"tensor {EXPERT}.quant_weight has shape [384, 64], expected [64, 384]"),
        (changed(f"{EXPERT}.super_scales", torch.zeros(384)),
         f"tensor {EXPERT}.super_scales has dtype F32, expected bfloat16"),
    ],
)  # fmt: skip
def test_damage_is_named_and_refused(
    edit: Edit, line: str, fd_single: Path, tmp_path: Path
) -> None:
    folder = damaged(fd_single, tmp_path / "damaged", edit)
    assert any(problem.startswith(line) for problem in check_folder(folder))
    with pytest.raises(ErnieQuantError) as refused:
        open_fastdeploy(folder)
    assert line in str(refused.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop(BIAS),
        lambda t: t.update({BIAS: t[BIAS].reshape(-1)}),
        lambda t: t.update({"ernie.layers.2.mlp.gate.weight": torch.zeros(384, 4).bfloat16()}),
        lambda t: t.update({SCALE: t[SCALE].float() * 1.0001}),
        lambda t: t.update({"ernie.mtp_block.0.norm.weight": torch.zeros(3)}),
    ],
    ids=["no bias", "flat bias", "bf16 router", "fp32 scale of wint8", "mtp"],
)
def test_what_the_loader_forgives_can_be_read_but_is_not_ours(
    edit: Edit, fd_single: Path, tmp_path: Path
) -> None:
    folder = damaged(fd_single, tmp_path / "damaged", edit)
    assert len(check_folder(folder)) == 1
    found, sound = open_fastdeploy(folder), open_fastdeploy(fd_single)
    for name in found.names():
        if name.startswith("model.layers.2.mlp.") and ".experts." not in name:
            tensor = found.tensor(name)
            assert tuple(tensor.shape) == found.shape(name)
            # Also what a scale means that is rounded when it is loaded.
            if "gate.weight" not in name:
                assert torch.equal(tensor, sound.tensor(name))


def test_every_problem_has_a_line(fd_single: Path) -> None:
    found = open_fastdeploy(fd_single)
    assert check_keys({}, found.model) == tuple(
        f"tensor {name} is missing" for name in rank_keys(found.model)
    )
