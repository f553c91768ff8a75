"""Perplexity of text given images, against a plain loop over the stock model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import erniequant
from erniequant.data.inputs import ModelInput, hash_inputs
from erniequant.errors import ErnieQuantError
from erniequant.evaluate import image_perplexity
from erniequant.evaluate.images import evaluation_inputs
from erniequant.generation import generate
from erniequant_cli.main import app
from tests.micro_vl import IMAGE, IMAGE_END, IMAGE_START, write_micro_vl

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 1


@pytest.fixture(scope="module")
def loaded(micro_vl: Path) -> tuple[Any, Any]:
    return erniequant.load(micro_vl, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_vl(tmp_path_factory.mktemp("other") / "model", seed=9)


def by_hand(model: Any, tokenizer: Any, path: Path) -> tuple[list[list[float]], list[list[Any]]]:
    """Per record with images: -ln p of each token of text behind the first image but the end of the
    text, and the whole distributions."""
    losses, rows = [], []
    for entry in evaluation_inputs(model, tokenizer, path):
        ids = entry.ids.tolist()
        types = [int(i in (IMAGE, IMAGE_START, IMAGE_END)) for i in ids]
        with torch.no_grad():
            logits = model(
                input_ids=entry.ids[None],
                pixel_values=torch.cat([p.patches for p in entry.images]),
                image_grid_thw=torch.tensor([p.grid for p in entry.images]),
                mm_token_type_ids=torch.tensor([[int(i == IMAGE) for i in ids]]),
                moe_mm_token_type_ids=torch.tensor([types]),
            ).logits[0]
        found, distributions = [], []
        for place in range(ids.index(IMAGE_START), len(ids)):
            if types[place] or (place == len(ids) - 1 and ids[place] == EOS):
                continue
            p = torch.softmax(logits[place - 1].double(), -1)
            found.append(-math.log(p[ids[place]]))
            distributions.append(p)
        losses.append(found)
        rows.append(distributions)
    return losses, rows


def test_against_a_plain_loop(loaded: tuple[Any, Any], other: Path, micro_records: Path) -> None:
    model, tokenizer = loaded
    reference, _ = erniequant.load(other, device="cpu", dtype="float32")
    found = image_perplexity(model, tokenizer, micro_records, reference=reference)
    mine, my_rows = by_hand(model, tokenizer, micro_records)
    theirs, their_rows = by_hand(reference, tokenizer, micro_records)
    # Three of four records have images; one of them three characters of text before its image.
    assert (found.records, found.images) == (18, 24)
    assert found.tokens == sum(map(len, mine)) == 6 * (20 + 20 + 13)
    flat = np.array([loss for losses in mine for loss in losses])
    assert found.nll == pytest.approx(flat.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(flat.mean()), rel=1e-5)
    # A record is one observation.
    sums = np.array([sum(losses) - len(losses) * flat.mean() for losses in mine])
    error = math.sqrt(18 / 17 * (sums**2).sum()) / len(flat)
    assert found.stderr == pytest.approx(found.perplexity * error, rel=1e-4)
    distance = found.reference
    assert distance is not None
    both = [np.array([x for losses in all_ for x in losses]) for all_ in (mine, theirs)]
    assert distance.ratio == pytest.approx(math.exp((both[0] - both[1]).mean()), rel=1e-5)
    kl = [
        float((q * (q / p).log()).sum())
        for ours, others in zip(my_rows, their_rows, strict=True)
        for p, q in zip(ours, others, strict=True)
    ]
    assert distance.kl_mean == pytest.approx(np.mean(kl), rel=1e-4)


def test_records_from_python(
    loaded: tuple[Any, Any], micro_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    expected = evaluation_inputs(model, tokenizer, micro_records)
    records = [json.loads(line) for line in micro_records.read_text().splitlines()]
    # Paths in them are relative to where we are.
    monkeypatch.chdir(micro_records.parent)
    batches = [entry.batch() for entry in expected]
    for given in (records, iter(records), expected, batches, Path("records.jsonl")):
        assert hash_inputs(evaluation_inputs(model, tokenizer, given)) == hash_inputs(expected)


def test_images_and_their_experts_matter(loaded: tuple[Any, Any], micro_records: Path) -> None:
    model, tokenizer = loaded
    inputs = evaluation_inputs(model, tokenizer, micro_records)
    right = image_perplexity(model, tokenizer, inputs)
    assert right == image_perplexity(model, tokenizer, micro_records)
    images = [entry.images for entry in inputs]
    # Records of one kind repeat every twelve, with images of the same shapes.
    swapped = [
        ModelInput(e.ids, e.placeholder, e.vision, e.positions, images[(i + 9) % 18])
        for i, e in enumerate(inputs)
    ]
    wrong = image_perplexity(model, tokenizer, swapped)
    assert wrong.inputs_sha256 != right.inputs_sha256
    assert abs(wrong.nll - right.nll) > 1e-3


def test_what_cannot_be_scored(
    loaded: tuple[Any, Any], micro_source: Path, micro_records: Path, tmp_path: Path
) -> None:
    model, tokenizer = loaded
    (tmp_path / "a.jsonl").write_text('{"text": "no images"}\n')
    with pytest.raises(ErnieQuantError, match="has no text after an image"):
        image_perplexity(model, tokenizer, tmp_path / "a.jsonl")
    with pytest.raises(ErnieQuantError, match="cannot read"):
        image_perplexity(model, tokenizer, tmp_path / "none.jsonl")
    text, letters = erniequant.load(micro_source, device="cpu")
    with pytest.raises(ErnieQuantError, match="the model is text-only"):
        image_perplexity(text, letters, micro_records)


def test_the_command_gives_both_figures(
    micro_vl: Path, other: Path, micro_text: Path, micro_records: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    arguments = ["eval", "perplexity", str(micro_vl), "--reference", str(other), "--device", "cpu",
                 "--json", str(out)]  # fmt: skip
    runner = CliRunner()
    result = runner.invoke(
        app, [*arguments, "--text", str(micro_text), "--images", str(micro_records)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["tokens"] > 2900 and found["reference"]["ratio"] > 0
    assert found["images"]["images"] == 24 and found["images"]["reference"]["ratio"] > 0
    assert "perplexity given images" in result.output
    # A text of one's own comes without images of ours.
    result = runner.invoke(app, [*arguments, "--text", str(micro_text)])
    assert result.exit_code == 0 and "images" not in json.loads(out.read_text())
    # The built-in ones are the default for a model that takes images.
    result = runner.invoke(app, [*arguments, "--context", "64", "--tokens", "128"])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["images"]["records"] > 20


def test_images_for_a_model_of_text_are_refused(
    micro_source: Path, micro_text: Path, micro_records: Path
) -> None:
    arguments = ["eval", "perplexity", str(micro_source), "--device", "cpu", "--text",
                 str(micro_text), "--images", str(micro_records)]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "the model is text-only" in result.output


def test_generation_sees_the_image(
    loaded: tuple[Any, Any], micro_records: Path, micro_source: Path
) -> None:
    model, tokenizer = loaded
    images = [micro_records.parent / "1-0.png", micro_records.parent / "1-1.png"]
    found = generate(model, tokenizer, "what?", images=images, max_tokens=8)
    assert found.prompt.count("<|IMAGE_START|>") == 2
    again = generate(model, tokenizer, "what?", images=images, max_tokens=8)
    assert found.text == again.text
    # Greedy, by hand and without a cache.
    from erniequant.data.image_inputs import image_inputs

    entry = image_inputs(model, tokenizer, "what?", images)
    assert entry.placeholder is not None and entry.vision is not None
    batch = entry.batch()
    expected: list[int] = []
    for _ in range(8):
        with torch.no_grad():
            token = int(model(**batch).logits[0, -1].argmax())
        if token == EOS:
            break
        expected.append(token)
        for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0),
                            ("moe_mm_token_type_ids", 0)):  # fmt: skip
            more = torch.tensor([[value]], dtype=batch[name].dtype)
            batch[name] = torch.cat([batch[name], more], dim=1)
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    text, letters = erniequant.load(micro_source, device="cpu")
    with pytest.raises(ErnieQuantError, match="the model is text-only"):
        generate(text, letters, "what?", images=images)


def test_the_generate_command_takes_images(micro_vl: Path, micro_records: Path) -> None:
    image = str(micro_records.parent / "0-0.png")
    arguments = ["generate", str(micro_vl), "hi", "--image", image, "--image", image,
                 "--max-tokens", "3", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*arguments[:4], "none.png", *arguments[7:]])
    assert result.exit_code == 1 and "there is no image" in result.output
