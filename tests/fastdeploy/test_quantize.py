"""From an original to a checkpoint for FastDeploy and back into transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import erniequant
from erniequant.ccq import decode_wint2
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy import check_folder, export_bf16, open_fastdeploy
from erniequant.quantization.report import QuantizationReport
from erniequant.runtime import fastdeploy_experts
from erniequant.runtime.fastdeploy_experts import FastDeployExperts
from erniequant.runtime.wint2_ops import run_wint2_kernels
from erniequant_cli.main import app
from tests.micro import FASTDEPLOY, StopAfter

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 60)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def test_fastdeploy_finds_every_key(quantized: tuple[Path, QuantizationReport]) -> None:
    folder, report = quantized
    assert check_folder(folder) == ()
    assert report.degraded == 0
    config = json.loads((folder / "config.json").read_text())
    w4 = config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]
    # Layer 0 is dense; the first layer with experts is layer 1.
    assert w4["quant_end_layer"] == 1
    assert json.loads((folder / "quantization_report.json").read_text())["format"] == {
        "format": "fastdeploy-wint2", "k_order": "mma64", "wint4_layers": [1],
        "wint2_layers": [2, 3],
    }  # fmt: skip
    stored = open_checkpoint(folder)
    assert report.plan.output_bytes == stored.total_bytes


def test_experts_are_what_they_decode_to(
    quantized: tuple[Path, QuantizationReport], fd_source: Path
) -> None:
    stored, original = open_checkpoint(quantized[0]), open_checkpoint(fd_source)
    for layer, bound in ((1, 0.035), (2, 0.35)):
        prefix = f"model.layers.{layer}.mlp.experts.2"
        exact = original.tensor(f"{prefix}.down_proj.weight").float()
        found = open_fastdeploy(quantized[0]).tensor(f"{prefix}.down_proj.weight")
        assert (found - exact).square().sum() < bound * exact.square().sum()
    names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
    key = "ernie.layers.2.mlp.experts.2.down_proj"
    parts = [stored.tensor(f"{key}.{name}") for name in names]
    assert torch.equal(decode_wint2(*parts, k_order="mma64").T, found)


def test_logits_of_the_import_are_those_of_the_export(
    quantized: tuple[Path, QuantizationReport], tmp_path: Path
) -> None:
    model, tokenizer = erniequant.load(
        quantized[0], device="cpu", dtype="float32", keep_decoded=True
    )
    assert tokenizer is not None
    runner = CliRunner()
    result = runner.invoke(app, ["export", str(quantized[0]), str(tmp_path / "x"), "--to", "fp32"])
    assert result.exit_code == 0, result.output
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "x", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits(model), logits(stock))
    # Packed weights are the same, multiplied in another order.
    packed, _ = erniequant.load(quantized[0], device="cpu", dtype="float32")
    assert (logits(packed) - logits(stock)).norm() < 1e-4 * logits(stock).norm()


def test_experts_stay_packed_and_keep_their_types(
    quantized: tuple[Path, QuantizationReport],
) -> None:
    model, _ = erniequant.load(quantized[0], device="cpu", keep_decoded=False)
    packed = [m for m in model.modules() if isinstance(m, FastDeployExperts)]
    assert len(packed) == 3
    # wint4 in the first layer with experts, WINT2 in the others.
    assert packed[0].up_gate_proj_quant_weight.dtype == torch.int8
    assert packed[1].up_gate_proj_quant_weight.shape == (4, 384 // 4, 2 * 256)
    expected = logits(model)
    for module in packed:
        module.keep_decoded = True
    # Products of packed weights are float32, of decoded ones bfloat16.
    assert (logits(model) - expected).norm() < 0.1 * expected.norm()
    # A code book that bfloat16 cannot hold survives the types of activations.
    books = packed[1].down_proj_code_scale.clone()
    assert not torch.equal(books.bfloat16().float(), books)
    weight = packed[1].weight("down_proj", 2, torch.float32)
    packed[1].to(torch.float16).to(torch.bfloat16)
    assert torch.equal(packed[1].down_proj_code_scale, books)
    assert torch.equal(packed[1].weight("down_proj", 2, torch.float32), weight)
    model.to(torch.float32)
    assert packed[1].down_proj_super_scales.dtype == torch.bfloat16
    exact, _ = erniequant.load(quantized[0], device="cpu", dtype="float32")
    # The weights in wint8 were rounded to bfloat16 here, which moves a router's choice or two.
    assert (logits(model) - logits(exact)).norm() < 0.1 * logits(exact).norm()


def test_wint2_on_the_kernels(
    quantized: tuple[Path, QuantizationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = erniequant.load(quantized[0], device="cpu", keep_decoded=False)
    experts = model.model.layers[3].mlp.experts
    x = torch.randn(9, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
    index = torch.arange(18).view(9, 2) % 4
    routing = torch.rand(9, 2, generator=torch.Generator().manual_seed(2))
    expected = experts(x, index, routing).float()
    # wint4 has none.
    assert model.model.layers[1].mlp.experts.k_order is None
    monkeypatch.setattr(fastdeploy_experts, "moe_experts_wint2", run_wint2_kernels)
    found = experts(x, index, routing).float()
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("order", ["mma64", "plain"])
def test_the_original_tells_an_order_that_no_file_says(
    quantized: tuple[Path, QuantizationReport],
    fd_source: Path,
    text: str,
    tmp_path: Path,
    order: str,
) -> None:
    folder = tmp_path / "q"
    if order == "mma64":
        shutil.copytree(quantized[0], folder)
    else:
        erniequant.quantize(fd_source, folder, calib=text, **FASTDEPLOY | {"k_order": order})
    expected = logits(erniequant.load(folder, device="cpu", dtype="float32")[0])
    # As a file of Baidu is.
    config = json.loads((folder / "config.json").read_text())
    del config["erniequant"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ErnieQuantError, match="give k_order"):
        erniequant.load(folder, device="cpu")
    for known in ({"k_order": order}, {"reference": fd_source}):
        model, _ = erniequant.load(folder, device="cpu", dtype="float32", **known)
        assert torch.equal(logits(model), expected)
    arguments = ["eval", "perplexity", str(folder), "--reference", str(fd_source), "--text", text,
                 "--device", "cpu", "--quiet"]  # fmt: skip
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_it_is_close_to_the_original(
    quantized: tuple[Path, QuantizationReport], fd_source: Path
) -> None:
    model, _ = erniequant.load(quantized[0], device="cpu", dtype="float32")
    original, _ = erniequant.load(fd_source, device="cpu", dtype="float32")
    wanted = logits(original)
    assert (logits(model) - wanted).norm() < 0.38 * wanted.norm()


def test_cut_for_two_ranks_and_joined_again(
    quantized: tuple[Path, QuantizationReport], tmp_path: Path
) -> None:
    arguments = ["export", str(quantized[0]), str(tmp_path / "tp2"), "--to", "fastdeploy-wint2",
                 "--tensor-parallel", "2"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert check_folder(tmp_path / "tp2") == ()
    whole, cut = open_fastdeploy(quantized[0]), open_fastdeploy(tmp_path / "tp2")
    assert len(cut.ranks) == 2 and whole.names() == cut.names()
    for name in whole.names():
        assert torch.equal(whole.tensor(name), cut.tensor(name)), name
    erniequant.export(tmp_path / "tp2", tmp_path / "plain", "fp32")
    model, _ = erniequant.load(tmp_path / "tp2", device="cpu", dtype="float32")
    assert torch.equal(logits(erniequant.load(tmp_path / "plain", device="cpu")[0]), logits(model))
    again, _ = erniequant.load(quantized[0], device="cpu", dtype="float32", keep_decoded=True)
    assert torch.equal(logits(model), logits(again))


def test_verify(
    quantized: tuple[Path, QuantizationReport], fd_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    runner = CliRunner()
    arguments = ["verify", "--reference", str(fd_source), "--json", str(out)]
    result = runner.invoke(app, [*arguments, str(quantized[0])])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    # Three matrices of four experts in three layers, attention, one dense MLP and shared experts.
    assert found["decoded_matrices"] == 3 * 4 * 3 + 4 * 4 + 3 + 3 * 3
    assert found["checksums"] == {"model.safetensors": "ok"}
    shutil.copytree(quantized[0], tmp_path / "damaged")
    shard = tmp_path / "damaged" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-50] ^= 1
    shard.write_bytes(raw)
    result = runner.invoke(app, [*arguments, str(tmp_path / "damaged")])
    assert result.exit_code == 1 and "missing or was changed" in result.output
    with pytest.raises(ErnieQuantError, match="model.safetensors is missing or was changed"):
        export_bf16(tmp_path / "damaged", tmp_path / "x")


def test_inspect_counts_what_was_planned(
    quantized: tuple[Path, QuantizationReport], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["inspect", str(quantized[0]), "--json", str(out)])
    assert result.exit_code == 0, result.output
    found, plan = json.loads(out.read_text()), quantized[1].plan
    assert found["bits_per_weight"]["experts"] == pytest.approx(plan.expert_bits_per_weight)
    assert found["expert_weights"] == plan.expert_weights == 3 * 4 * 3 * 384 * 256
    assert found["total_bytes"] == plan.output_bytes
    assert found["codes"] == {"experts: wint2, k_order mma64": 2, "experts: wint4": 1}
    assert {t["name"] for t in found["tensors"]} == set(open_checkpoint(quantized[0]).names())


# Among the wint4 experts of layer 1, among the WINT2 ones of layer 2, and of the last layer.
@pytest.mark.parametrize("done", [2, 6, 11])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    quantized: tuple[Path, QuantizationReport],
    fd_source: Path,
    text: str,
    tmp_path: Path,
    done: int,
) -> None:
    folder = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        erniequant.quantize(fd_source, folder, calib=text, progress=StopAfter(done), **FASTDEPLOY)
    with pytest.raises(ErnieQuantError, match="k_order|the plan|--format"):
        erniequant.quantize(fd_source, folder, calib=text, **FASTDEPLOY | {"k_order": "plain"})
    report = erniequant.quantize(fd_source, folder, calib=text, threads=1, **FASTDEPLOY)
    assert report.sessions == 2
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (quantized[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "has 2 bits, not 3"),
        ({"w4_layers": 9}, "w4-layers 9 of 3"),
        ({"format": "gguf"}, "no format 'gguf'"),
        ({"format": "native"}, "k-order and w4-layers are of the format"),
        ({"k_order": "mma32"}, "no k_order 'mma32'"),
    ],
)
def test_what_does_not_go_is_one_line(
    fd_source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        erniequant.quantize(fd_source, tmp_path / "q", no_calib=True, **FASTDEPLOY | changes)
    assert not (tmp_path / "q").exists()


def test_models_and_folders_that_do_not_go(
    micro_vl: Path, micro_ernie: Path, packed_ernie: Path, tmp_path: Path
) -> None:
    for source, message in (
        (micro_vl, "text mixtures of experts only"),
        (micro_ernie, "hidden_size 96; FastDeploy needs a multiple of 128"),
    ):
        with pytest.raises(ErnieQuantError, match=message):
            erniequant.quantize(source, tmp_path / "q", no_calib=True, **FASTDEPLOY)
    arguments = ["export", str(packed_ernie), str(tmp_path / "x"), "--to", "fastdeploy-wint2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "erniequant quantize SRC DST --bits 2 --format fastdeploy-wint2" in result.output
