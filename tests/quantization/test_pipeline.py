"""From checkpoint to checkpoint on a micro model: complete, deterministic, honest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import erniequant
from erniequant.checkpoint.layout import PlannedShard
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import verify
from erniequant.models.registry import architecture_of
from erniequant.quantization.memory import MemoryInputs, largest_layer, plan_memory
from tests.micro import CALIBRATION


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


@pytest.fixture(scope="module")
def quantized(
    micro_source: Path, micro_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "q2"
    erniequant.quantize(
        micro_source, folder, bits=2, calib=str(micro_text), threads=1, **CALIBRATION
    )
    return folder


def test_the_result_is_complete_and_sound(quantized: Path, micro_source: Path) -> None:
    verified = verify(quantized, reference=micro_source)
    assert verified.ok and verified.mean_error is not None and 0 < verified.mean_error < 0.2
    source, result = tensors_of(micro_source), tensors_of(quantized)
    report = json.loads((quantized / "quantization_report.json").read_text())
    trained = {name for stage in report["tuned"] for name in stage["moved"]}
    for name, tensor in source.items():
        if ".mlp.experts." not in name:
            assert torch.equal(result.pop(name), tensor) or name in trained, name
    expected = {
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in (1, 2)
        for name in ("down_proj",)
        + tuple(
            f"{p}_{s}" for p in ("gate_up_proj", "down_proj") for s in ("packed", "scale", "signs")
        )
    }
    assert set(result) == expected


def test_size_is_the_planned_size(quantized: Path) -> None:
    report = json.loads((quantized / "quantization_report.json").read_text())
    assert report["bytes"]["after"] == open_checkpoint(quantized).total_bytes
    experts = sum(
        t.numel() * t.element_size() for n, t in tensors_of(quantized).items() if ".experts." in n
    )
    assert report["bits_per_weight"]["experts"] == pytest.approx(
        8 * experts / (2 * 8 * 3 * 64 * 96)
    )


def test_threads_and_repetition_do_not_change_a_bit(
    quantized: Path, micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    erniequant.quantize(
        micro_source, tmp_path / "again", bits=2, calib=str(micro_text), threads=3, **CALIBRATION
    )
    first = (quantized / "model.safetensors").read_bytes()
    assert first == (tmp_path / "again" / "model.safetensors").read_bytes()
    other = erniequant.quantize(
        micro_source, tmp_path / "seed", bits=2, calib=str(micro_text), seed=1, **CALIBRATION
    )
    assert first != (tmp_path / "seed" / "model.safetensors").read_bytes()
    assert other.plan.options.seed == 1


def test_the_loaded_model_is_its_exported_one(quantized: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    erniequant.export(quantized, tmp_path / "plain", to="fp32")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, experts_implementation="eager"
    )
    packed, tokenizer = erniequant.load(quantized, device="cpu", dtype="float32")
    ids = torch.tensor([tokenizer("a quick test of logits")["input_ids"]])
    with torch.no_grad():
        expected, found = plain(ids).logits, packed(ids).logits
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_more_bits_mean_less_error(
    quantized: Path, micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    def mean_error(folder: Path) -> float:
        layers = json.loads((folder / "quantization_report.json").read_text())["layer_errors"]
        return sum(sum(by_name.values()) for by_name in layers.values()) / 4

    for bits in (3, 4):
        erniequant.quantize(
            micro_source, tmp_path / f"q{bits}", bits=bits, calib=str(micro_text), **CALIBRATION
        )
    errors = [mean_error(folder) for folder in (quantized, tmp_path / "q3", tmp_path / "q4")]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def edited_source(source: Path, folder: Path, name: str, value: torch.Tensor) -> Path:
    shutil.copytree(source, folder)
    tensors = tensors_of(folder)
    for shard in folder.glob("model*.safetensors*"):
        shard.unlink()
    tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_starved_expert_is_reported_and_stored_like_its_siblings(
    micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    bias = torch.zeros(1, 8)
    bias[0, 3] = -100
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    source = edited_source(micro_source, tmp_path / "starved", name, bias)
    report = erniequant.quantize(
        source, tmp_path / "q", bits=2, calib=str(micro_text), **CALIBRATION
    )
    assert report.tokens_per_expert()[1][3] == 0
    assert min(report.tokens_per_expert()[1][:3]) > 0
    assert report.degraded >= 2
    assert {(m.layer, m.expert) for m in report.matrices if m.tokens == 0} >= {(1, 3)}
    assert max(m.error for m in report.matrices) < 0.5
    erniequant.load(tmp_path / "q", device="cpu")


def test_no_calibration_is_not_degraded(micro_source: Path, tmp_path: Path) -> None:
    report = erniequant.quantize(
        micro_source, tmp_path / "q", bits=3, no_calib=True, max_tp=1, effort="fast"
    )
    assert (report.degraded, report.calibration) == (0, None)
    assert len(report.matrices) == 2 * 8 * 2
    erniequant.load(tmp_path / "q", device="cpu")


def test_a_dry_run_writes_nothing(micro_source: Path, tmp_path: Path) -> None:
    report = erniequant.quantize(micro_source, tmp_path / "q", bits=2, dry_run=True)
    assert not (tmp_path / "q").exists()
    assert "2 bits" in report.plan_text
    assert report.to_dict()["dry_run"] is True


def test_a_damaged_weight_stops_the_run_and_leaves_no_model(
    micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    name = "model.layers.2.mlp.experts.6.down_proj.weight"
    weight = tensors_of(micro_source)[name].clone()
    weight[3, 4] = float("nan")
    source = edited_source(micro_source, tmp_path / "nan", name, weight)
    with pytest.raises(ErnieQuantError, match=f"{name} in .* holds inf or nan"):
        erniequant.quantize(source, tmp_path / "q", bits=2, calib=str(micro_text), **CALIBRATION)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calib": "missing.txt"}, "cannot read missing.txt"),
        ({"device": "tpu"}, "no such device|not supported"),
        ({"bits": 7}, "bits must be 2, 3 or 4"),
        ({"max_tp": 3}, "--max-tp 3 does not divide"),
    ],
)
def test_bad_options_are_refused(
    micro_source: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        erniequant.quantize(micro_source, tmp_path / "q", **{"bits": 2, **options})


def test_a_destination_in_use_is_left_alone(micro_source: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ErnieQuantError, match="not empty"):
        erniequant.quantize(micro_source, tmp_path, bits=2, no_calib=True, max_tp=1)
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_a_result_of_another_size_than_planned_is_refused(
    micro_source: Path, micro_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erniequant.checkpoint.shards import ShardFiles

    finish = ShardFiles.finish

    def longer(self: ShardFiles, shard: PlannedShard) -> str:
        digest = finish(self, shard)
        with (self.folder / shard.file).open("ab") as file:
            file.write(bytes(int(0.02 * shard.n_bytes)))
        return digest

    monkeypatch.setattr(ShardFiles, "finish", longer)
    with pytest.raises(ErnieQuantError, match="bytes, but .* were planned"):
        erniequant.quantize(
            micro_source, tmp_path / "q", bits=2, calib=str(micro_text), **CALIBRATION
        )
    assert not (tmp_path / "q" / "config.json").exists()


def test_the_report_has_what_was_predicted_beside_what_was_measured(quantized: Path) -> None:
    report = json.loads((quantized / "quantization_report.json").read_text())
    predicted, measured = report["predicted"], report["measured"]
    assert set(predicted) == set(measured) == {
        "seconds", "peak_memory_bytes", "peak_vram_bytes", "disk_bytes"
    }  # fmt: skip
    assert measured["peak_vram_bytes"] == 0 < measured["peak_memory_bytes"]
    weights = sum(path.stat().st_size for path in quantized.glob("*.safetensors"))
    # States of 768 tokens: two streams, of one layer at the time of measuring.
    assert weights < measured["disk_bytes"] <= predicted["disk_bytes"] + 100_000
    # The dense layer and both others; the last is the whole.
    seconds = report["layer_seconds"]
    assert len(seconds) == 3 and seconds == sorted(seconds) and seconds[-1] <= measured["seconds"]


def test_tables_on_disk_and_fewer_experts_at_once_do_not_change_a_bit(
    quantized: Path, micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(micro_source)
    model = architecture_of(checkpoint.config)
    layer = largest_layer(checkpoint, model)
    least = plan_memory(model, MemoryInputs(12 * 64, 64, 0, layer), 3, 0, True)
    assert (least.experts_at_once, least.tables_on_disk) == (1, True)
    bound = least.peak_bytes
    options = {"bits": 2, "calib": str(micro_text), "threads": 3, **CALIBRATION}
    report = erniequant.quantize(micro_source, tmp_path / "q", max_memory=bound, **options)
    assert "experts at a time: 1, activations in mapped files" in report.plan_text
    first = (quantized / "model.safetensors").read_bytes()
    assert first == (tmp_path / "q" / "model.safetensors").read_bytes()
    with pytest.raises(ErnieQuantError, match=f"--max-memory {bound - 1} is too little"):
        erniequant.quantize(micro_source, tmp_path / "less", max_memory=bound - 1, **options)
    assert not (tmp_path / "less").exists()
