"""The benefit of calibration images for the vision experts, on the embedded trained
model; docs/vision_language.md has the figures."""

from typing import Any

import pytest

import erniequant
import erniequant_data
from benchmarks.vision_language import page
from erniequant.data.inputs import ModelInput
from erniequant.evaluate import image_perplexity
from erniequant.evaluate.images import evaluation_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The original, and two models of 2 bits: calibrated with images, and text-only."""
    folder = tmp_path_factory.mktemp("vl")
    (folder / "text.txt").write_text(erniequant_data.calibration_text(), "utf-8")
    source = erniequant_data.tiny_vl_model_dir()
    found = {"original": erniequant.load(source, device="cpu")[0]}
    for name, calib in (("images", "builtin"), ("text", str(folder / "text.txt"))):
        # All 43 records with images, and 43 short windows of text.
        report = erniequant.quantize(
            source, folder / name, bits=2, calib=calib, calib_samples=43, calib_length=256,
            device="cpu", tune="none",
        )  # fmt: skip
        assert (report.degraded == 0) == (name == "images")
        found[name] = erniequant.load(folder / name, device="cpu")[0]
    return found


@pytest.fixture(scope="module")
def inputs(models: dict[str, Any]) -> list[ModelInput]:
    _, tokenizer = erniequant.load(erniequant_data.tiny_vl_model_dir(), device="cpu")
    return evaluation_inputs(models["original"], tokenizer, "builtin")


def test_weighted_errors_fall_in_nearly_every_matrix(
    models: dict[str, Any], inputs: list[ModelInput]
) -> None:
    with_images, on_text = (
        page.matrix_errors(models["original"], models[name], inputs) for name in ("images", "text")
    )
    # Two matrices of eight experts in three layers; on held-out images.
    assert len(with_images) == 48
    lower = [with_images[name] < on_text[name] for name in with_images]
    assert sum(lower) >= 46
    total = [sum(errors.values()) for errors in (with_images, on_text)]
    assert total[0] < 0.3 * total[1]


def test_text_is_predicted_better_given_images(
    models: dict[str, Any], inputs: list[ModelInput]
) -> None:
    found = image_perplexity(models["text"], None, inputs, reference=models["images"])
    assert found.reference is not None
    # Above 1: the reference, which has seen images, is better on the same tokens.
    assert found.reference.ratio > 1.001
