"""Every kind of ERNIE 4.5 text checkpoint, from quantisation to logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import erniequant
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import inspect, verify
from erniequant.quantization.report import QuantizationReport
from testing.micro_model import add_tokenizer, write_micro_ernie
from tests.micro import CALIBRATION

MTP = {
    "model.mtp_block.0.self_attn.q_proj.weight": torch.randn(96, 96),
    "model.mtp_linear_proj.0.weight": torch.randn(96, 192),
    # Its MLP has the names of experts elsewhere, and is none.
    "model.mtp_block.0.mlp.gate_proj.weight": torch.randn(160, 96),
}
Tensors = dict[str, torch.Tensor]


def add_mtp(tensors: Tensors) -> None:
    tensors |= {name: tensor.bfloat16() for name, tensor in MTP.items()}


def add_tied_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def drop_bias(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith("e_score_correction_bias")]:
        del tensors[name]


def nothing(tensors: Tensors) -> None: ...


def edit(folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], None]]] = {
    "untied head": ({"tie_word_embeddings": False}, nothing),
    "tied head that is stored as well": ({}, add_tied_head),
    "MTP tensors": ({"num_nextn_predict_layers": 1}, add_mtp),
    "no correction bias": ({"moe_use_aux_free": False}, drop_bias),
    "no shared experts": ({"moe_num_shared_experts": 0}, nothing),
    # Layers 1 and 3 have experts, 0, 2 and 4 do not: the last layer is dense.
    "every second layer": ({"moe_layer_interval": 2, "num_hidden_layers": 5}, nothing),
    "dense layers at the end": ({"moe_layer_end_index": 1}, nothing),
    "experts in the first layer": ({"moe_layer_start_index": 0}, nothing),
    # 160 = 5 * 32 and 224 = 7 * 32: tiles and rotation blocks of 32, sign words not full.
    "sizes with small powers of two": ({"hidden_size": 160, "moe_intermediate_size": 224}, nothing),
    "wide heads": ({"head_dim": 40}, nothing),
    "one token in one expert": ({"moe_k": 1}, nothing),
    "attention with biases": ({"use_bias": True, "moe_num_shared_experts": 0}, nothing),
}


@pytest.mark.parametrize("case", CASES)
def test_from_checkpoint_to_logits(case: str, micro_text: Path, tmp_path: Path) -> None:
    changes, change = CASES[case]
    source = edit(add_tokenizer(write_micro_ernie(tmp_path / "source", **changes)), change)
    check_round_trip(source, micro_text, tmp_path)


def test_a_dense_model(micro_dense: Path, micro_text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in micro_dense.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    report = check_round_trip(add_tokenizer(source), micro_text, tmp_path)
    # Every token of the text passes the only expert; four of twelve windows are for training.
    assert report.tokens_per_expert() == {layer: [8 * 64] for layer in range(3)}
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 2
    assert list(config["quantization_config"]["layers"]) == ["0.mlp", "1.mlp", "2.mlp"]


def check_round_trip(source: Path, text: Path, folder: Path) -> QuantizationReport:
    """Quantise; every other tensor is there, verbatim where the report does not list it as trained;
    logits are those of the stock export, and near the source's."""
    report = erniequant.quantize(
        source, folder / "q", bits=4, calib=str(text), device="cpu", threads=1, tune="layer",
        **CALIBRATION,
    )  # fmt: skip
    assert verify(folder / "q", reference=source).ok
    before, after = open_checkpoint(source), open_checkpoint(folder / "q")
    quantized = set(report.plan.quantized)
    trained = {name for stage in report.tuned for name in stage.moved}
    assert trained <= set(before.names()) - quantized
    for name in before.names():
        if name not in quantized | trained:
            assert torch.equal(before.tensor(name), after.tensor(name)), name
    assert after.total_bytes == report.plan.output_bytes
    erniequant.export(folder / "q", folder / "plain", to="fp32")

    def stock(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, experts_implementation="eager"
        )

    packed, tokenizer = erniequant.load(folder / "q", device="cpu", dtype="float32")
    ids = torch.tensor([tokenizer(text.read_text()[:50])["input_ids"]])
    with torch.no_grad():
        original, exported, found = (
            m(ids).logits for m in (stock(source), stock(folder / "plain"), packed)
        )
    assert (found - exported).norm() <= 1e-4 * exported.norm()
    assert (found - original).norm() <= 0.17 * original.norm()
    return report


def test_mtp_tensors_are_listed_and_verbatim(micro_text: Path, tmp_path: Path) -> None:
    source = edit(add_tokenizer(write_micro_ernie(tmp_path / "source")), add_mtp)
    erniequant.quantize(
        source, tmp_path / "q", bits=2, calib=str(micro_text), threads=1, **CALIBRATION
    )
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    assert sorted(report["mtp_tensors"]) == sorted(MTP)
    kept = {tensor.name for tensor in inspect(tmp_path / "q").tensors if not tensor.quantized}
    assert set(MTP) <= kept


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        (
            {"tie_word_embeddings": False},
            lambda t: t.pop("lm_head.weight"),
            "tensor lm_head.weight is missing",
        ),
        (
            {"moe_num_shared_experts": 0},
            lambda t: t.update({"model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(2)}),
            "shared_experts.up_proj.weight is not part of",
        ),
        ({"moe_layer_interval": 2}, lambda t: t.update(MTPX=torch.ones(2)), "MTPX is not part of"),
        ({"hidden_act": "gelu"}, nothing, "hidden_act 'gelu'; only silu can be calibrated"),
        ({"moe_intermediate_size": 48}, nothing, "48, is not a multiple of 32"),
    ],
)
def test_what_does_not_fit_the_config_is_named(
    changes: dict[str, Any], change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    source = edit(write_micro_ernie(tmp_path / "source", **changes), change)
    with pytest.raises(ErnieQuantError, match=message):
        erniequant.quantize(source, tmp_path / "q", bits=2, max_tp=1, dry_run=True)
