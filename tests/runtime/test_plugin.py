"""The transformers plugin: same logits as an export, and saving gives back what was loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import erniequant
from erniequant.checkpoint import open_checkpoint
from erniequant.integrations.transformers.plugin import ErnieQuantizer, register
from erniequant.runtime.experts import PackedExperts
from tests.runtime.models import IDS, load, logits


@pytest.fixture(scope="module")
def exports(packed_ernie: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for to in ("bf16", "fp32"):
        erniequant.export(packed_ernie, root / to, to)
    return {to: root / to for to in ("bf16", "fp32")}


def test_float32_equals_the_export(packed_ernie: Path, exports: dict[str, Path]) -> None:
    ours = logits(load(packed_ernie, dtype=torch.float32))
    stock = load(exports["fp32"])
    assert type(stock.model.layers[1].mlp.experts).__name__ == "Ernie4_5_MoeExperts"
    exact = logits(stock)
    assert (ours - exact).norm() <= 1e-6 * exact.norm()


def test_bfloat16_equals_the_export(packed_ernie: Path, exports: dict[str, Path]) -> None:
    p = logits(load(packed_ernie)).log_softmax(-1)
    q = logits(load(exports["bf16"])).log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    assert kl.mean() <= 5e-4
    # The test can tell: the float32 export, rounded nowhere, is farther away than that of bfloat16.
    far = logits(load(exports["fp32"])).log_softmax(-1)
    assert (far.exp() * (far - p)).sum(-1).mean() > kl.mean()


def test_types_after_loading_in_bfloat16(packed_ernie: Path) -> None:
    model = load(packed_ernie, dtype=torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    assert experts.gate_up_proj_packed.dtype == torch.int32
    assert experts.gate_up_proj_scale.dtype == torch.int16
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in experts.parameters())
    # A cast must not round the scales, which it would if they were stored as numbers.
    before = experts.down_proj_scale.clone()
    experts.half()
    assert torch.equal(experts.down_proj_scale, before)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_save_and_load_again(packed_ernie: Path, tmp_path: Path, shard: str) -> None:
    model = load(packed_ernie)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    before, after = tensors(packed_ernie), tensors(tmp_path / "again")
    assert set(before) == set(after)
    for name, tensor in before.items():
        if ".mlp.experts." in name:
            assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    settings = [json.loads((d / "config.json").read_text())["quantization_config"]
                for d in (packed_ernie, tmp_path / "again")]  # fmt: skip
    assert settings[0] == settings[1]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    erniequant.load(tmp_path / "again")


def test_layers_that_stay_stock(
    packed_ernie: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    """Layer 2 as it was in the original: loads, runs, and saving does not cut up layer 1."""
    folder = tmp_path / "partly"
    folder.mkdir()
    mixed = {k: v for k, v in tensors(packed_ernie).items() if "layers.2.mlp.experts" not in k}
    mixed |= {k: v for k, v in tensors(exports["bf16"]).items() if "layers.2.mlp.experts" in k}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed_ernie / "config.json").read_text())
    del config["quantization_config"]["layers"]["2"]
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    names = [type(layer.mlp.experts).__name__ for layer in model.model.layers[1:]]
    assert names == ["PackedExperts", "Ernie4_5_MoeExperts"]
    model.save_pretrained(tmp_path / "again")
    assert set(tensors(tmp_path / "again")) == set(mixed)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    erniequant.load(tmp_path / "again")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(packed_ernie: Path, device_map: Any) -> None:
    placed = load(packed_ernie, device_map=device_map)
    assert torch.equal(logits(placed), logits(load(packed_ernie)))


def test_disk_offload(packed_ernie: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                  "model.layers.2": "disk"}  # fmt: skip
    model = load(packed_ernie, device_map=device_map, offload_folder=tmp_path / "off")
    assert model.model.layers[1].mlp.experts.down_proj_packed.device.type == "meta"
    assert torch.equal(logits(model), logits(load(packed_ernie)))


@torch.no_grad()
def test_generate_with_and_without_cache(packed_ernie: Path) -> None:
    model = load(packed_ernie, dtype=torch.float32)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, use_cache=True, **options)
    assert cached.shape == (2, 31)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    step = model(cached[:, :-1]).logits[:, 18:].argmax(-1)
    assert torch.equal(cached[:, 19:], step)


def test_dequantize_gives_a_stock_model(packed_ernie: Path, tmp_path: Path) -> None:
    model = load(packed_ernie, dtype=torch.float32)
    expected = logits(model)
    plain = model.dequantize()
    assert type(plain.model.layers[1].mlp.experts).__name__ == "Ernie4_5_MoeExperts"
    assert (logits(plain) - expected).norm() <= 1e-6 * expected.norm()
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    again = logits(load(tmp_path / "plain"))
    assert (again - logits(plain)).norm() <= 1e-6 * expected.norm()


def test_headless_model(packed_ernie: Path, tmp_path: Path) -> None:
    model, info = AutoModel.from_pretrained(packed_ernie, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model.layers[2].mlp.experts, PackedExperts)
    model.save_pretrained(tmp_path / "headless")
    names = open_checkpoint(tmp_path / "headless").names()
    assert any(name.endswith("layers.2.mlp.experts.down_proj_packed") for name in names)
    again = AutoModel.from_pretrained(tmp_path / "headless")
    assert torch.equal(again(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_missing_tensor_is_an_error_even_without_our_loader(
    packed_ernie: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(packed_ernie, folder)
    name = "model.layers.1.mlp.experts.down_proj_scale"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    rest = {k: v for k, v in load_file(shard).items() if k != name}
    save_file(rest, shard, metadata={"format": "pt"})
    with pytest.raises(erniequant.ErnieQuantError, match=f"tensor {name} is missing"):
        AutoModelForCausalLM.from_pretrained(folder)
    as_int32 = torch.zeros(8, 96, 1, dtype=torch.int32)
    save_file({**rest, name: as_int32}, shard, metadata={"format": "pt"})
    with pytest.raises(
        erniequant.ErnieQuantError, match=f"tensor {name} has dtype I32, expected int16"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_quantising_on_load_is_refused(micro_ernie: Path, packed_ernie: Path) -> None:
    config = AutoConfig.from_pretrained(packed_ernie).quantization_config
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(micro_ernie, quantization_config=_as_object(config))


def _as_object(settings: dict[str, Any]) -> Any:
    from erniequant.integrations.transformers.plugin import ErnieQuantConfig

    return ErnieQuantConfig.from_dict(settings)


def test_parallel_plan_replicates_the_experts(packed_ernie: Path) -> None:
    settings = AutoConfig.from_pretrained(packed_ernie).quantization_config
    quantizer = ErnieQuantizer(_as_object(settings), pre_quantized=True)
    plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    }
    quantizer.update_parallel_plan(torch.nn.Module(), plan)
    assert set(plan) == {"layers.*.self_attn.q_proj", "layers.*.mlp.shared_experts.down_proj"}
    config = AutoConfig.from_pretrained(packed_ernie)
    of_the_class = dict(type(config).base_model_tp_plan)
    config = quantizer.update_ep_plan(quantizer.update_tp_plan(config))
    assert any(".experts" in rule for rule in of_the_class)
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan):
        assert not any(".mlp.experts" in rule for rule in plan)
    assert type(config).base_model_tp_plan == of_the_class


def test_registering_twice() -> None:
    register()
    register()
