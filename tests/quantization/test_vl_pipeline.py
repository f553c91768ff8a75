"""A vision-language checkpoint from source to logits, and what calibration does to its two sets of
experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

import erniequant
from erniequant import system
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.data.inputs import ModelInput
from erniequant.errors import ErnieQuantError
from erniequant.evaluate.images import evaluation_inputs
from erniequant.quantization.report import QuantizationReport
from erniequant.runtime.experts import PackedExperts
from erniequant_cli.main import app
from tests.micro import StopAfter

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"calib_samples": 24, "calib_length": 64, "max_tp": 1, "effort": "fast", "tune": "none"}
GROUPS = ("text_moe", "vision_moe")


@pytest.fixture(scope="module")
def quantized(
    micro_vl: Path, micro_records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizationReport]:
    """At 2 bits: whatever is mixed up shows. In float32, as the models that it is compared with:
    rounding decides between experts that are about as good."""
    folder = tmp_path_factory.mktemp("vl") / "q"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "fast_bfloat16", lambda: False)
        report = erniequant.quantize(
            micro_vl, folder, bits=2, calib=str(micro_records), device="cpu", **OPTIONS
        )
    return folder, report


@pytest.fixture(scope="module")
def stock(
    quantized: tuple[Path, QuantizationReport], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The stock model of the decoded weights."""
    folder = tmp_path_factory.mktemp("vl") / "plain"
    erniequant.export(quantized[0], folder, "fp32")
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert not any(isinstance(module, PackedExperts) for module in model.modules())
    return model


@pytest.fixture(scope="module")
def inputs(quantized: tuple[Path, QuantizationReport], micro_records: Path) -> list[ModelInput]:
    model, tokenizer = erniequant.load(quantized[0], device="cpu")
    return evaluation_inputs(model, tokenizer, micro_records)


def padded(entries: list[ModelInput]) -> dict[str, torch.Tensor]:
    """Several inputs as one batch, padded on the left."""
    longest = max(map(len, entries))
    rows: dict[str, list[torch.Tensor]] = {}
    for entry in entries:
        batch = entry.batch()
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids"):
            row = torch.zeros(longest, dtype=torch.int64)
            row[longest - len(entry) :] = batch[name][0]
            rows.setdefault(name, []).append(row)
        for name in ("pixel_values", "image_grid_thw"):
            rows.setdefault(name, []).append(batch[name])
    join = {name: torch.cat for name in ("pixel_values", "image_grid_thw")}
    return {name: join.get(name, torch.stack)(parts) for name, parts in rows.items()}


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(**batch).logits.float()
    return found[batch["attention_mask"].bool()]


def batches(inputs: list[ModelInput]) -> dict[str, dict[str, torch.Tensor]]:
    vision_only = {name: tensor for name, tensor in inputs[0].batch().items()}
    vision = inputs[0].vision
    assert vision is not None
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids"):
        vision_only[name] = vision_only[name][:, vision]
    return {
        "text": ModelInput(torch.arange(3, 40)).batch(),
        "one image": inputs[0].batch(),
        "two images": inputs[1].batch(),
        "padded batch with four images": padded(inputs[:3]),
        "nothing but an image": vision_only,
    }


KINDS = ("text", "one image", "two images", "padded batch with four images",
         "nothing but an image")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_decoded_stock_model(
    quantized: tuple[Path, QuantizationReport], stock: Any, inputs: list[ModelInput], kind: str
) -> None:
    model, _ = erniequant.load(quantized[0], device="cpu", dtype="float32")
    batch = batches(inputs)[kind]
    found, expected = logits(model, batch), logits(stock, batch)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_loads_through_transformers_and_saves(
    quantized: tuple[Path, QuantizationReport], inputs: list[ModelInput], auto: Any, tmp_path: Path
) -> None:
    model, info = auto.from_pretrained(quantized[0], dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    expected = logits(model, inputs[1].batch())
    model.save_pretrained(tmp_path / "again")
    again, _ = erniequant.load(tmp_path / "again", device="cpu", dtype="float32")
    assert torch.equal(logits(again, inputs[1].batch()), expected)


def test_tokens_per_expert_are_those_that_a_forward_pass_routes(
    quantized: tuple[Path, QuantizationReport], inputs: list[ModelInput], micro_records: Path
) -> None:
    """The first layer with experts sees what the original makes of the text, so its counts can be
    had from the quantised model as well as from the stock one."""
    folder, report = quantized
    model, tokenizer = erniequant.load(folder, device="cpu", dtype="float32")
    counts = {(i, name): torch.zeros(4, dtype=torch.int64) for i in (1, 2) for name in GROUPS}
    for (layer, name), count in counts.items():
        gate = getattr(model.model.language_model.layers[layer].mlp, name).gate

        def add(module: Any, given: Any, out: Any, count: torch.Tensor = count) -> None:
            count += torch.bincount(out[2].flatten(), minlength=4)

        gate.register_forward_hook(add)
    text = [json.loads(line)["text"] for line in micro_records.read_text().splitlines()]
    ids: list[int] = []
    for number, line in enumerate(text):
        if number % 4 == 3:
            ids += [*tokenizer(line, add_special_tokens=False)["input_ids"], 1]
    stream = torch.tensor(ids)
    windows = [ModelInput(part) for part in stream.split(64) if len(part) == 64]
    with torch.no_grad():
        for entry in [*windows, *inputs]:
            model(**entry.batch())
    found = {key: report.tokens_per_expert()[f"{key[0]}.{key[1]}"] for key in counts}
    assert found == {key: count.tolist() for key, count in counts.items()}
    calibration = report.calibration
    assert calibration is not None
    assert calibration.images == sum(len(entry.images) for entry in inputs) == 24
    assert calibration.vision_tokens == sum(int(entry.vision.sum()) for entry in inputs)
    assert sum(found[1, "vision_moe"]) == 2 * calibration.vision_tokens


def test_batches_give_what_records_give(
    micro_vl: Path, inputs: list[ModelInput], tmp_path: Path
) -> None:
    ready = [padded(inputs[:5]), *(entry.batch() for entry in inputs[5:])]
    single = [entry.batch() for entry in inputs]
    for name, calib in (("ready", ready), ("single", single)):
        erniequant.quantize(micro_vl, tmp_path / name, bits=3, calib=calib, device="cpu", **OPTIONS)
    first, second = (tmp_path / name / "model.safetensors" for name in ("ready", "single"))
    assert first.read_bytes() == second.read_bytes()


def test_text_alone_is_announced_and_degraded(
    micro_vl: Path, micro_text: Path, tmp_path: Path
) -> None:
    runner = CliRunner()
    arguments = ["quantize", str(micro_vl), str(tmp_path / "q"), "--bits", "2", "--calib",
                 str(micro_text), "--calib-samples", "8", "--calib-length", "64", "--max-tp", "1",
                 "--effort", "fast", "--device", "cpu"]  # fmt: skip
    planned = runner.invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0
    assert "no images in" in planned.output
    result = runner.invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert "no images in" in result.output
    # Both matrices of four experts in two layers.
    assert "16 expert matrices are degraded" in result.output
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    assert report["calibration"]["images"] == 0
    assert report["tokens_per_expert"]["1.vision_moe"] == [0] * 4
    assert report["degraded"] == 16
    # They are sound all the same, and take what the text experts see for their inputs.
    errors = report["layer_errors"]["1.vision_moe"]
    assert 0 < errors["gate_up_proj"] < 0.2 and 0 < errors["down_proj"] < 0.2


# Among the text experts of the first layer, between both sets, among the vision experts, and in
# the last layer.
@pytest.mark.parametrize("done", [2, 4, 7, 14])
@pytest.mark.usefixtures("float32_products")
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    quantized: tuple[Path, QuantizationReport],
    micro_vl: Path,
    micro_records: Path,
    tmp_path: Path,
    done: int,
) -> None:
    def run(**more: Any) -> QuantizationReport:
        return erniequant.quantize(
            micro_vl, tmp_path / "q", bits=2, calib=str(micro_records), device="cpu", **OPTIONS,
            **more,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(progress=StopAfter(done), threads=1)
    # Other threads and memory: tables on disk, one expert at a time.
    report = run(resume=True, threads=2, max_memory="760MB")
    assert report.sessions == 2
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (quantized[0] / name).read_bytes()
    assert report.matrices == quantized[1].matrices


def test_other_images_are_another_run(micro_vl: Path, micro_records: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "records"
    shutil.copytree(micro_records.parent, folder)
    options = {"bits": 2, "calib": str(folder / "records.jsonl"), "device": "cpu", **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        erniequant.quantize(micro_vl, tmp_path / "q", progress=StopAfter(3), **options)
    shutil.copy(folder / "1-0.png", folder / "0-0.png")
    with pytest.raises(ErnieQuantError, match="calibration text"):
        erniequant.quantize(micro_vl, tmp_path / "q", **options)


def test_everything_but_experts_is_a_copy(
    quantized: tuple[Path, QuantizationReport], micro_vl: Path
) -> None:
    source, result = open_checkpoint(micro_vl), open_checkpoint(quantized[0])
    kept = [name for name in source.names() if ".mlp.experts." not in name]
    for name in kept:
        before, after = source.tensor(name), result.tensor(name)
        assert before.dtype == after.dtype and torch.equal(before, after), name
    packed = set(result.names()) - set(kept)
    assert {name.split(".mlp.")[1].split(".")[0] for name in packed} == set(GROUPS)
