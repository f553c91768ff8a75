"""Both streams end where the stock model and the quantised model end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import erniequant
from erniequant.calibration.rows import RowPool
from erniequant.calibration.texts import (
    CalibrationConfig,
    CalibrationWindows,
    calibration_windows,
)
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.data.inputs import ModelInput
from erniequant.models.registry import architecture_of
from erniequant.quantization import run
from erniequant.quantization.hidden_states import HiddenStates

pytestmark = pytest.mark.usefixtures("float32_products")


def last_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states after the last layer, before the final norm."""
    found = []
    model.model.layers[-1].register_forward_hook(lambda *a: found.append(a[2]))
    with torch.no_grad():
        model(ids[None])
    states = found[0][0] if isinstance(found[0], tuple) else found[0]
    return states.reshape(len(ids), -1)


# Of nine windows, three are for training; of three windows none would change anything.
@pytest.mark.parametrize(("tune", "samples"), [("none", 3), ("layer", 9)])
def test_streams_end_where_the_models_end(
    micro_source: Path, micro_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tune: str, samples: int,
) -> None:  # fmt: skip
    kept: list[HiddenStates] = []

    class Kept(HiddenStates):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            kept.append(self)

    monkeypatch.setattr(run, "HiddenStates", Kept)
    # Windows of 50: three of them on two threads, and 50 fills no block of anything.
    report = erniequant.quantize(
        micro_source, tmp_path / "q", bits=2, calib=str(micro_text), calib_samples=samples,
        calib_length=50, max_tp=1, effort="fast", device="cpu", threads=2, tune=tune,
    )  # fmt: skip
    assert any(stage.epochs for stage in report.tuned) == (tune == "layer")
    packed, tokenizer = erniequant.load(tmp_path / "q", device="cpu", dtype="float32")
    config = CalibrationConfig(str(micro_text), samples=samples, length=50)
    windows = calibration_windows(tokenizer, config).windows
    stock = AutoModelForCausalLM.from_pretrained(
        micro_source, dtype=torch.float32, experts_implementation="eager"
    )
    quantized, original = (table.tensor for table in kept[0].tables)
    for model, states in ((stock, original), (packed, quantized)):
        expected = torch.cat([last_states(model, window.ids) for window in windows])
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
    # Two bits on random weights: the streams are far apart, so neither stands in for the other.
    assert (original - quantized).norm() > 0.03 * original.norm()


@pytest.mark.parametrize("bad", ["quantised input", "original input", "drift"])
def test_tokens_with_a_bad_number_in_either_model_are_marked(
    micro_source: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    checkpoint = open_checkpoint(micro_source)
    model = architecture_of(checkpoint.config)
    ids = torch.arange(20) + 3
    windows = CalibrationWindows((ModelInput(ids[:12]), ModelInput(ids[12:])), "", "")
    streams = HiddenStates(checkpoint, model, windows, torch.device("cpu"), 1, RowPool())
    streams.embed()
    streams.through_dense_layer(0)
    route, calls = model.route, [0]

    def damaged(layer: Any, hidden: torch.Tensor, vision: None) -> Any:
        calls[0] += 1
        moved, found = route(layer, hidden, vision)
        # Both windows of the quantised model, then both of the original; a token of each second.
        if calls[0] == {"quantised input": 2, "original input": 4, "drift": 4}[bad]:
            (moved[0] if bad == "drift" else found.x)[3, 7] = float("inf")
        return moved, found

    monkeypatch.setattr(model, "route", damaged)
    assert (~streams.into_experts(1).finite).nonzero().flatten().tolist() == [12 + 3]
