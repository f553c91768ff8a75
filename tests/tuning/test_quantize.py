"""Training as a step of `erniequant.quantize`: what it may change, what it reports, and that every
reader agrees on the result."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import erniequant
from erniequant.quantization import run as run_module
from erniequant.quantization.model_tuning import train_model
from erniequant.tuning.config import Training
from tests.micro import CALIBRATION

pytestmark = pytest.mark.usefixtures("one_thread")

# A random model has little to learn: small steps improve it surely.
SMALL_STEPS = Training(epochs=2, windows_per_step=2, rate=1e-3, matrix_rate=1e-3, heldout=4)


def quantized(source, folder, text, monkeypatch, **options):
    monkeypatch.setattr(run_module, "LAYER", SMALL_STEPS)
    monkeypatch.setattr(run_module, "MODEL", SMALL_STEPS)
    return erniequant.quantize(
        source,
        folder,
        bits=2,
        calib=str(text),
        device="cpu",
        **{**CALIBRATION, "tune": "layer", **options},
    )


def tensors(folder):
    return {n: t for shard in folder.glob("*.safetensors") for n, t in load_file(shard).items()}


@pytest.mark.parametrize("tune", ["layer", "model"])
def test_tuned_models(micro_source, micro_text, tmp_path, monkeypatch, tune):
    report = quantized(micro_source, tmp_path / "q", micro_text, monkeypatch, tune=tune)
    before, after = tensors(micro_source), tensors(tmp_path / "q")
    moved = {name: far for stage in report.tuned for name, far in stage.moved.items()}
    assert moved
    assert all(stage.after < stage.before for stage in report.tuned if stage.epochs)
    for name, tensor in before.items():
        if name not in after:
            continue  # experts
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        far = (after[name].float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-30)
        # The last stage that moved a tensor says how far it is from the source.
        assert float(far) == pytest.approx(moved.get(name, 0.0), rel=1e-3, abs=1e-7), name
    assert "model.embed_tokens.weight" not in moved
    assert not any("e_score_correction_bias" in name for name in moved)
    layers = {stage.layer for stage in report.tuned}
    assert layers == ({1, 2, 3} if tune == "model" else {1, 2})
    assert json.loads((tmp_path / "q/quantization_report.json").read_text())["tuned"]
    # What is kept beside the result was predicted: every layer until the model was trained.
    untuned = quantized(micro_source, tmp_path / "n", micro_text, monkeypatch, tune="none")
    more = report.predicted.disk_bytes - untuned.predicted.disk_bytes
    assert report.measured.disk_bytes - untuned.measured.disk_bytes <= more + 50_000
    bytes_moved = 2 * sum(before[name].numel() for name in moved)
    assert more > (bytes_moved if tune == "model" else bytes_moved / 3)
    planned = {g.names for g in report.plan.groups if g.fate == "tune"}
    assert ("model.norm.weight" in planned) == (tune == "model")

    # Stock transformers on the export: the same routing, the same logits.
    erniequant.export(tmp_path / "q", tmp_path / "plain", to="fp32")
    ids = torch.arange(40).view(2, 20)
    packed, _ = erniequant.load(tmp_path / "q", device="cpu", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)

    assert not erniequant.verify(tmp_path / "q", reference=micro_source).problems


def test_training_of_the_model_goes_on_from_its_tuned_layers(
    micro_source, micro_text, tmp_path, monkeypatch
):
    """It begins with what training of layers alone writes."""
    begun_with = {}

    def seen(*arguments):
        begun_with.update(arguments[4])
        return train_model(*arguments)

    monkeypatch.setattr(run_module, "train_model", seen)
    quantized(micro_source, tmp_path / "model", micro_text, monkeypatch, tune="model")
    layers = quantized(micro_source, tmp_path / "layer", micro_text, monkeypatch, tune="layer")
    moved = {name for stage in layers.tuned for name in stage.moved}
    written = tensors(tmp_path / "layer")
    assert moved and moved == begun_with.keys()
    assert all(torch.equal(begun_with[name], written[name]) for name in moved)


def test_verify_names_what_was_not_trained(micro_source, micro_text, tmp_path, monkeypatch):
    quantized(micro_source, tmp_path / "q", micro_text, monkeypatch)
    path = tmp_path / "q/model.safetensors"
    content = load_file(path)
    content["model.embed_tokens.weight"][3, 3] += 1
    save_file(content, path, metadata={"format": "pt"})
    problems = erniequant.verify(tmp_path / "q", reference=micro_source).problems
    assert any("model.embed_tokens.weight differs from the reference" in line for line in problems)


@pytest.mark.parametrize("options", [{"tune": "none"}, {"no_calib": True, "tune": "model"}])
def test_nothing_is_trained(micro_source, micro_text, tmp_path, monkeypatch, options):
    report = quantized(micro_source, tmp_path / "q", micro_text, monkeypatch, **options)
    assert not report.tuned
    before, after = tensors(micro_source), tensors(tmp_path / "q")
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())
    assert not any(group.fate == "tune" for group in report.plan.groups)


def test_gradients_of_the_original_change_the_codes(
    micro_source, micro_text, tmp_path, monkeypatch
):
    for name in ("activation", "gradient"):
        quantized(
            micro_source, tmp_path / name, micro_text, monkeypatch, tune="none", sensitivity=name
        )
    one, other = (tensors(tmp_path / name) for name in ("activation", "gradient"))
    name = "model.layers.1.mlp.experts.down_proj_packed"
    assert one.keys() == other.keys() and not torch.equal(one[name], other[name])


def test_a_vision_language_model(micro_vl, micro_records, tmp_path, monkeypatch):
    """Routers are stored transposed, both biases in one tensor, and image tokens have experts of
    their own."""
    # One record again and again, from which even random layers learn.
    records = micro_records.with_name("again.jsonl")
    records.write_text(micro_records.read_text().splitlines(keepends=True)[0] * 24)
    report = quantized(micro_vl, tmp_path / "q", records, monkeypatch, calib_samples=24)
    moved = {name for stage in report.tuned for name in stage.moved}
    assert {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight_1"} <= moved
    assert not any("vision_model" in name or "resampler" in name for name in moved)
    assert not erniequant.verify(tmp_path / "q", reference=micro_vl).problems
    erniequant.export(tmp_path / "q", tmp_path / "plain", to="fp32")
    ids = torch.arange(40).view(2, 20)
    models = [
        erniequant.load(tmp_path / name, device="cpu", dtype=torch.float32)[0]
        for name in ("q", "plain")
    ]
    with torch.no_grad():
        packed, plain = (model(ids).logits for model in models)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tune", ["layer", "model"])
def test_too_few_windows(micro_source, micro_text, tmp_path, monkeypatch, tune):
    """Five windows leave one for training, and none to say when to stop."""
    report = quantized(
        micro_source, tmp_path / "q", micro_text, monkeypatch, tune=tune, calib_samples=5
    )
    assert not report.tuned
    assert {m.tokens for m in report.matrices} != {0}
    assert not erniequant.verify(tmp_path / "q", reference=micro_source).problems


def test_unknown_modes_are_refused(micro_source, tmp_path):
    for options in ({"tune": "all"}, {"sensitivity": "none"}):
        with pytest.raises(erniequant.ErnieQuantError, match="must be one of"):
            erniequant.quantize(micro_source, tmp_path / "q", bits=2, **options)
