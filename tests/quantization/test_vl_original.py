"""A vision-language checkpoint as Baidu publishes it, quantised: the result needs none of its code,
and an interrupted run ends in the same files."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoTokenizer

import erniequant
from erniequant.checkpoint.files import sha256_of
from erniequant.data.companions import write_companions
from erniequant.data.image_inputs import image_inputs
from erniequant.errors import ErnieQuantError
from erniequant.quantization import destination as destinations
from tests.micro_original import PATCH, write_original
from tests.micro_vl import write_image

OPTIONS: dict[str, Any] = {
    "bits": 2, "max_tp": 1, "effort": "fast", "threads": 1, "device": "cpu", "calib_samples": 4,
    "calib_length": 32,
}  # fmt: skip
TEXT = "The quick brown 狐狸 of 1984\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return write_original(folder / "published", folder / "converted")


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture(scope="module")
def result(original: Path, calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("q") / "result"
    erniequant.quantize(original, folder, calib=str(calib), **OPTIONS)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files but the report, which has times in it."""
    return {
        path.name: sha256_of(path)
        for path in folder.iterdir()
        if path.is_file() and path.name != "quantization_report.json"
    }


def test_the_result_needs_no_code(original: Path, result: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(result, trust_remote_code=False)
    model = SentencePieceProcessor(model_file=str(original / "tokenizer.model"))
    assert tokenizer(TEXT)["input_ids"] == model.encode(TEXT)
    assert AutoConfig.from_pretrained(result).model_type == "ernie4_5_vl_moe"
    assert not list(result.glob("*.py")) and not list(original.glob("EXECUTED"))
    for path in result.glob("*.json"):
        assert "auto_map" not in path.read_text(), path


def test_the_report_lists_every_shard(result: Path) -> None:
    report = json.loads((result / "quantization_report.json").read_text())
    assert report["sha256"] == {p.name: sha256_of(p) for p in result.glob("*.safetensors")}


def test_reads_images_as_the_original(original: Path, result: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", 5 * PATCH, 4 * PATCH)
    inputs = []
    for folder in (original, result):
        model, tokenizer = erniequant.load(folder, device="cpu", dtype="float32")
        inputs.append(image_inputs(model, tokenizer, "What is it?", [image]).batch())
        with torch.no_grad():
            assert bool(torch.isfinite(model(**inputs[-1]).logits).all())
    assert inputs[0].keys() == inputs[1].keys()
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
    # Grids are even: 4 x 4 or 4 x 6 patches, of which four are a token.
    ids = inputs[0]["input_ids"][0].tolist()
    assert ids.count(6) == int(inputs[0]["image_grid_thw"].prod()) // 4 > 0
    assert ids.count(7) == ids.count(8) == 1


def test_an_interrupted_run_writes_the_same_files(
    original: Path, calib: Path, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, destination: Path) -> None:
        write_companions(source, destination)
        raise KeyboardInterrupt

    folder = tmp_path / "result"
    monkeypatch.setattr(destinations, "write_companions", killed)
    with pytest.raises(KeyboardInterrupt):
        erniequant.quantize(original, folder, calib=str(calib), **OPTIONS)
    assert not (folder / "config.json").exists()
    monkeypatch.undo()
    erniequant.quantize(original, folder, calib=str(calib), resume=True, **OPTIONS)
    assert contents(folder) == contents(result)


@pytest.mark.parametrize("name", ["tokenizer.model", "added_tokens.json"])
def test_a_run_does_not_go_on_with_another_tokenizer(
    original: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(original, source)

    def killed(source: Path, destination: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(destinations, "write_companions", killed)
    with pytest.raises(KeyboardInterrupt):
        erniequant.quantize(source, tmp_path / "q", no_calib=True, **OPTIONS)
    monkeypatch.undo()
    from tests.micro_original import train_sentencepiece

    if name == "tokenizer.model":
        # Another tokenizer of as many pieces.
        (source / name).write_bytes(train_sentencepiece(normalization_rule_name="nfkc"))
    else:
        (source / name).write_text("{}")
    with pytest.raises(ErnieQuantError, match="the source's other files"):
        erniequant.quantize(source, tmp_path / "q", no_calib=True, **OPTIONS)


@pytest.mark.parametrize("no_calib", [True, False])
def test_a_missing_package_is_named_before_the_work(
    original: Path, no_calib: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ErnieQuantError, match="pip install sentencepiece"):
        erniequant.quantize(original, tmp_path / "q", no_calib=no_calib, **OPTIONS)
    assert not (tmp_path / "q").exists()


def test_export_of_the_result_loads(result: Path, tmp_path: Path) -> None:
    erniequant.export(result, tmp_path / "plain", "fp32")
    _, tokenizer = erniequant.load(tmp_path / "plain", device="cpu")
    _, expected = erniequant.load(result, device="cpu")
    assert tokenizer(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
