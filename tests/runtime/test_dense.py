"""Dense models in transformers: the logits of an export, saved as loaded, refused without us."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import erniequant
from erniequant.checkpoint import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.integrations.transformers.plugin import ErnieQuantConfig, ErnieQuantizer
from erniequant.packing.schema import LayerSpec, MatrixSpec
from erniequant.runtime import experts as experts_module
from erniequant.runtime import ops
from erniequant.runtime.mlp import PackedMlp
from tests.runtime.models import IDS, load, logits

Edit = Callable[[dict[str, torch.Tensor]], None]
Damaged = Callable[[Edit], Path]
WithConfig = Callable[[Path, Callable[[dict[str, Any]], Any]], Path]


def mlps(model: Any) -> list[str]:
    return [type(layer.mlp).__name__ for layer in model.model.layers]


@pytest.fixture(scope="module")
def export(packed_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "fp32"
    erniequant.export(packed_dense, folder, "fp32")
    return folder


@pytest.mark.parametrize("keep_decoded", [True, False])
def test_float32_equals_the_export(packed_dense: Path, export: Path, keep_decoded: bool) -> None:
    ours, _ = erniequant.load(
        packed_dense, device="cpu", dtype="float32", keep_decoded=keep_decoded
    )
    stock = load(export)
    assert mlps(ours) == ["PackedMlp", "PackedMlp", "Ernie4_5MLP"]
    assert mlps(stock) == ["Ernie4_5MLP"] * 3
    exact = logits(stock)
    assert (logits(ours) - exact).norm() <= 1e-4 * exact.norm()


def test_bfloat16_equals_the_export(packed_dense: Path, export: Path) -> None:
    p = logits(load(packed_dense, dtype=torch.bfloat16)).log_softmax(-1)
    q = logits(load(export, dtype=torch.bfloat16)).log_softmax(-1)
    assert (q.exp() * (q - p)).sum(-1).mean() <= 5e-4


@torch.no_grad()
def test_one_mlp_by_hand() -> None:
    spec = LayerSpec(MatrixSpec("cc3", 12, 32, 32), MatrixSpec("cc2", 10, 32, 16))
    mlp = PackedMlp(96, 160, spec, "silu", "4.mlp")
    for name, parameter in mlp.named_parameters():
        if name.endswith(("_packed", "_scale", "_signs")):
            # Scales are patterns of bfloat16; these are numbers between 0.016 and 0.031.
            low, high = (0x3C80, 0x3D00) if name.endswith("_scale") else (-(2**31), 2**31)
            parameter.copy_(torch.randint(low, high, parameter.shape))
    x = torch.randn(2, 3, 96)
    gate, up = mlp.weight("gate_up_proj", 0, torch.float32).double().chunk(2)
    down = mlp.weight("down_proj", 0, torch.float32).double()
    g = x.double() @ gate.T
    expected = (g * torch.sigmoid(g) * (x.double() @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert mlp(x.bfloat16()).dtype == torch.bfloat16
    assert mlp(x[:, :0]).shape == (2, 0, 96)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mlp(x))


@torch.no_grad()
def test_on_the_kernels(packed_dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One expert, one slot, all tokens in it.
    model, _ = erniequant.load(packed_dense, device="cpu", dtype="bfloat16", keep_decoded=False)
    expected = logits(model).log_softmax(-1)
    tokens = []

    def on_kernels(x: torch.Tensor, index: Any, routing: Any, *rest: Any) -> torch.Tensor:
        tokens.append(len(x))
        *tensors, spec, _ = rest
        layer = ops.parse_spec(spec)
        return ops.run_kernels(x, index, routing, tuple(tensors[:3]), tuple(tensors[3:]), layer)

    monkeypatch.setattr(experts_module, "moe_experts", on_kernels)
    found = logits(model).log_softmax(-1)
    assert tokens == [38, 38]
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 5e-4


def test_types_after_loading(packed_dense: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load(packed_dense, dtype=dtype)
        mlp = model.model.layers[1].mlp
        assert mlp.gate_up_proj_packed.dtype == torch.int32
        assert mlp.gate_up_proj_scale.dtype == torch.int16
        # The guard is in the files alone: a module of its name would take adapters.
        assert not hasattr(mlp, "down_proj")
        assert model.dtype == model.model.layers[2].mlp.up_proj.weight.dtype == dtype
        assert not any(p.requires_grad for p in mlp.parameters())


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_save_and_load_again(packed_dense: Path, tmp_path: Path, shard: str) -> None:
    model = load(packed_dense)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    before, after = (open_checkpoint(folder) for folder in (packed_dense, tmp_path / "again"))
    assert set(before.names()) == set(after.names())
    for name in before.names():
        assert before.header(name).stored_dtype == after.header(name).stored_dtype
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    assert before.config["quantization_config"] == after.config["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    erniequant.load(tmp_path / "again", device="cpu")


def test_headless_model(packed_dense: Path, tmp_path: Path) -> None:
    model, info = AutoModel.from_pretrained(packed_dense, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model.layers[1].mlp, PackedMlp)
    model.save_pretrained(tmp_path / "headless")
    assert "layers.1.mlp.down_proj.weight" in open_checkpoint(tmp_path / "headless").names()
    again = AutoModel.from_pretrained(tmp_path / "headless")
    assert torch.equal(again(IDS).last_hidden_state, model(IDS).last_hidden_state)


@torch.no_grad()
def test_generate_with_and_without_cache(packed_dense: Path) -> None:
    model = load(packed_dense, dtype=torch.float32)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, use_cache=True, **options)
    assert cached.shape == (2, 27)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


def test_dequantize_gives_a_stock_model(packed_dense: Path, tmp_path: Path) -> None:
    model = load(packed_dense, dtype=torch.float32)
    expected = logits(model)
    plain = model.dequantize()
    assert mlps(plain) == ["Ernie4_5MLP"] * 3
    assert (logits(plain) - expected).norm() <= 1e-6 * expected.norm()
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    again = logits(load(tmp_path / "plain"))
    assert (again - expected).norm() <= 1e-6 * expected.norm()


def test_disk_offload(packed_dense: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                  "model.layers.2": "disk"}  # fmt: skip
    model = load(packed_dense, device_map=device_map, offload_folder=tmp_path / "off")
    assert model.model.layers[1].mlp.down_proj_packed.device.type == "meta"
    assert torch.equal(logits(model), logits(load(packed_dense)))


@pytest.mark.parametrize(("every", "last"), [(True, "PackedMlp"), (False, "Ernie4_5MLP")])
def test_loading_is_a_plain_read(packed_dense: Path, export: Path, every: bool, last: str) -> None:
    settings = AutoConfig.from_pretrained(packed_dense).quantization_config
    if every:
        settings["layers"]["2.mlp"] = settings["layers"]["0.mlp"]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(export))
    quantizer = ErnieQuantizer(_as_object(settings), pre_quantized=True)
    quantizer.preprocess_model(model)
    assert mlps(model) == ["PackedMlp", "PackedMlp", last]
    assert quantizer.update_weight_conversions([]) == []


def _as_object(settings: dict[str, Any]) -> Any:
    return ErnieQuantConfig.from_dict(settings)


def test_refusals_without_our_loader(
    packed_dense: Path, packed_ernie: Path, with_config: WithConfig
) -> None:
    def add(key: str, like: str, version: int) -> Callable[[dict[str, Any]], None]:
        def edit(config: dict[str, Any]) -> None:
            settings = config["quantization_config"]
            settings["layers"][key] = settings["layers"][like]
            settings["format_version"] = version

        return edit

    refused = AutoModelForCausalLM.from_pretrained
    beyond = with_config(packed_dense, add("3.mlp", "0.mlp", 2))
    with pytest.raises(ErnieQuantError, match=r"names layers\.3\.mlp, which the model lacks"):
        refused(beyond)
    mixture = with_config(packed_ernie, add("0.mlp", "1", 2))
    with pytest.raises(ErnieQuantError, match=r"names layers\.0\.mlp, which the model lacks"):
        refused(mixture)
    biased = with_config(packed_dense, lambda c: c.update(use_bias=True))
    with pytest.raises(ErnieQuantError, match="config.json has use_bias"):
        refused(biased)


@pytest.mark.parametrize("name", ["down_proj_scale", "down_proj.weight"])
def test_missing_tensor_is_an_error_even_without_our_loader(
    damaged_dense: Damaged, name: str
) -> None:
    full = f"model.layers.1.mlp.{name}"
    folder = damaged_dense(lambda tensors: tensors.__delitem__(full))
    with pytest.raises(ErnieQuantError, match=rf"tensor {full} is missing"):
        AutoModelForCausalLM.from_pretrained(folder)
    shard = folder / "model.safetensors"
    save_file({**load_file(shard), full: torch.zeros(2)}, shard, metadata={"format": "pt"})
    with pytest.raises(ErnieQuantError, match=rf"tensor {full} has dtype F32"):
        erniequant.load(folder, device="cpu")


def test_stock_transformers_refuses(packed_dense: Path) -> None:
    script = (
        "from transformers import AutoModelForCausalLM as A; import sys\n"
        f"try: A.from_pretrained({str(packed_dense)!r})\n"
        "except RuntimeError as e: print('refused', e)\n"
        "assert 'erniequant' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused" in done.stdout and "size" in done.stdout
    assert "mlp.down_proj.weight" in done.stderr and "MISMATCH" in done.stderr


def test_parallel_plan_replicates_the_mlps(packed_dense: Path, packed_ernie: Path) -> None:
    def quantizer(folder: Path) -> ErnieQuantizer:
        settings = AutoConfig.from_pretrained(folder).quantization_config
        return ErnieQuantizer(_as_object(settings), pre_quantized=True)

    plan = {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    mixture = dict(plan)
    quantizer(packed_dense).update_parallel_plan(torch.nn.Module(), plan)
    assert set(plan) == {"model.layers.*.self_attn.q_proj"}
    # The dense layers of a mixture are stock modules, which the rules are for.
    untouched = dict(mixture)
    quantizer(packed_ernie).update_parallel_plan(torch.nn.Module(), mixture)
    assert mixture == untouched
    config = AutoConfig.from_pretrained(packed_dense)
    of_the_class = dict(type(config).base_model_tp_plan)
    assert any(".mlp." in rule for rule in of_the_class)
    config = quantizer(packed_dense).update_tp_plan(config)
    assert config.base_model_tp_plan and not any(".mlp." in r for r in config.base_model_tp_plan)
    assert type(config).base_model_tp_plan == of_the_class
