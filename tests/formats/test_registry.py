"""A format is a folder and a row: a toy one goes all the way from `quantize` to `load`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import erniequant
from erniequant.checkpoint.reader import Checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats import rows
from erniequant.formats.base import OutputFormat
from erniequant.formats.native.format import NativeFormat
from erniequant.formats.native.output import NativeOutput
from erniequant.formats.plan import Plan, QuantizeOptions
from erniequant.formats.registry import check_options, format_of
from erniequant.formats.results import ModelSummary
from erniequant.models.architecture import Architecture
from tests.micro import CALIBRATION


class ToyOutput(NativeOutput):
    """Our own tensors, under a config.json that says whose they are."""

    def config(self) -> dict[str, Any]:
        return {**super().config(), "toy": self._plan.options.own["flavour"]}


class ToyFormat(NativeFormat):
    name, title, own_options = "toy", "toys", ("flavour",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "toy" in config

    def check(self, options: QuantizeOptions) -> None:
        if options.own.get("flavour") not in ("sweet", "sour"):
            raise ErnieQuantError("flavour must be sweet or sour")

    def output(
        self, checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions
    ) -> tuple[OutputFormat, Plan]:
        output, plan = super().output(checkpoint, model, options)
        assert isinstance(output, NativeOutput)
        return ToyOutput(checkpoint, plan, output._specs), plan

    def inspect(self, source: str | Path) -> ModelSummary:
        raise ErnieQuantError("toys are not looked into")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyFormat:
    module = ModuleType("toy_format")
    module.FORMAT = ToyFormat()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_format", module)
    monkeypatch.setitem(rows.ROWS, "toy", "toy_format")
    found: ToyFormat = module.FORMAT
    return found


def test_a_row_is_all_it_takes(
    toy: ToyFormat, micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    chosen = {"format": "toy", "format_options": {"flavour": "sour"}}
    erniequant.quantize(
        micro_source, tmp_path / "q", bits=2, calib=str(micro_text), **CALIBRATION, **chosen
    )
    assert json.loads((tmp_path / "q/config.json").read_text())["toy"] == "sour"
    assert format_of(tmp_path / "q") is toy
    model, _ = erniequant.load(tmp_path / "q", device="cpu")
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    assert erniequant.verify(tmp_path / "q").ok
    with pytest.raises(ErnieQuantError, match="not looked into"):
        erniequant.inspect(tmp_path / "q")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "toy"}, "sweet or sour"),
        ({"format": "toy", "own": {"flavour": "salty"}}, "sweet or sour"),
        (
            {"format": "native", "own": {"flavour": "sour"}},
            "flavour is of the format toy; leave it out",
        ),
        ({"format": "toy", "own": {"k_order": "plain"}}, "w4-layers are of the format fastdeploy"),
        ({"own": {"colour": "red"}}, "no format has the option colour"),
        ({"format": "other"}, "no format 'other'; use native or fastdeploy-wint2 or toy"),
    ],
)
def test_options_belong_to_their_format(toy: ToyFormat, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ErnieQuantError, match=said):
        check_options(QuantizeOptions(2, **options))


def test_plain_and_remote_checkpoints_are_native(micro_ernie: Path) -> None:
    assert format_of(micro_ernie).name == "native"
    assert format_of("baidu/ERNIE-4.5-21B-A3B-PT").name == "native"
