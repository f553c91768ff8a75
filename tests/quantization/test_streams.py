"""Both streams end where the stock model and the quantised model end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import erniequant
from erniequant.calibration.texts import CalibrationConfig, calibration_windows
from erniequant.quantization import run
from erniequant.quantization.streams import Streams


def last_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states after the last layer, before the final norm."""
    found = []
    model.model.layers[-1].register_forward_hook(lambda *a: found.append(a[2]))
    with torch.no_grad():
        model(ids[None])
    states = found[0][0] if isinstance(found[0], tuple) else found[0]
    return states.reshape(len(ids), -1)


def test_streams_end_where_the_models_end(
    micro_source: Path, micro_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Streams] = []

    class Kept(Streams):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(run, "Streams", Kept)
    # Windows of 50: three of them on two threads, and 50 fills no block of anything.
    erniequant.quantize(
        micro_source, tmp_path / "q", bits=2, calib=str(micro_text), calib_samples=3,
        calib_length=50, max_tp=1, effort="fast", device="cpu", threads=2,
    )  # fmt: skip
    packed, tokenizer = erniequant.load(tmp_path / "q", device="cpu", dtype="float32")
    config = CalibrationConfig(str(micro_text), samples=3, length=50)
    windows = calibration_windows(tokenizer, config).windows
    stock = AutoModelForCausalLM.from_pretrained(
        micro_source, dtype=torch.float32, experts_implementation="eager"
    )
    quantized, original = (table.tensor for table in kept[0].tables)
    for model, states in ((stock, original), (packed, quantized)):
        expected = torch.cat([last_states(model, ids) for ids in windows])
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
    # Two bits on random weights: the streams are far apart, so neither stands in for the other.
    assert (original - quantized).norm() > 0.03 * original.norm()
