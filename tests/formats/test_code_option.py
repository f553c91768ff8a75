"""The code of a result: by width and effort, or by name; names that do not go are one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import erniequant
from erniequant.codes import encode_rate, get_code
from erniequant.errors import ErnieQuantError
from erniequant.formats.plan import QuantizeOptions
from erniequant.formats.registry import check_options, get_format
from tests.micro import CALIBRATION, StopAfter


def codes_in(folder: Path) -> set[tuple[str, int]]:
    """Code and register length of every matrix of a checkpoint."""
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    matrices = [matrix for layer in layers.values() for matrix in layer.values()]
    return {(matrix["code"], matrix["register_length"]) for matrix in matrices}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"bits": 2}, ("cc2", 12)),
        ({"bits": 2, "effort": "fast"}, ("cc2", 10)),
        ({"bits": 2, "effort": "max"}, ("cc2s", 16)),
        ({"bits": 2, "code": "cc2s", "effort": "fast"}, ("cc2s", 10)),
        ({"bits": 2, "code": "cc2s"}, ("cc2s", 12)),
        ({"bits": 2, "code": "cc2s", "effort": "max"}, ("cc2s", 16)),
        ({"bits": 2, "code": "cc2", "effort": "max"}, ("cc2", 16)),
        ({"bits": 3, "effort": "max"}, ("cc3", 16)),
        ({"bits": 4, "code": "cc4"}, ("cc4", 13)),
    ],
)
def test_the_plan_and_its_time_are_those_of_the_code(
    micro_source: Path, options: dict[str, Any], code: tuple[str, int]
) -> None:
    report = erniequant.quantize(micro_source, "unused", dry_run=True, max_tp=1, **options)
    planned = report.plan.settings
    for projection in ("gate_up_proj", "down_proj"):
        assert (planned[projection]["code"], planned[projection]["register_length"]) == code
    rate = get_format("native").encode_rate(report.plan.options)
    assert rate == encode_rate(get_code(*code))


def test_a_named_code_from_quantize_to_load(
    micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    shared: dict[str, Any] = {"bits": 2, "calib": str(micro_text), **CALIBRATION}
    named, plain = tmp_path / "cc2s", tmp_path / "cc2"
    erniequant.quantize(micro_source, named, code="cc2s", **shared)
    erniequant.quantize(micro_source, plain, **shared)
    assert codes_in(named) == {("cc2s", 10)} and codes_in(plain) == {("cc2", 10)}
    # The same size, and less error: on Gaussian data 2 % less at ten bits.
    assert erniequant.inspect(named).total_bytes == erniequant.inspect(plain).total_bytes
    errors = [erniequant.verify(q, reference=micro_source).mean_error for q in (named, plain)]
    assert errors[0] < errors[1]
    model, _ = erniequant.load(named, device="cpu", dtype="float32")
    erniequant.export(named, tmp_path / "exported", to="fp32")
    exported, _ = erniequant.load(tmp_path / "exported", device="cpu", dtype="float32")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected, found = exported(ids).logits, model(ids).logits
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_an_unfinished_run_does_not_change_its_code(
    micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"bits": 2, "calib": str(micro_text), **CALIBRATION}
    with pytest.raises(KeyboardInterrupt):
        erniequant.quantize(micro_source, tmp_path / "q", progress=StopAfter(2), **options)
    with pytest.raises(ErnieQuantError, match="the plan"):
        erniequant.quantize(micro_source, tmp_path / "q", code="cc2s", **options)
    # Named or not, the same code is the same run.
    report = erniequant.quantize(micro_source, tmp_path / "q", code="cc2", **options)
    assert report.sessions == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 2, "own": {"code": "cc5"}}, "unknown code 'cc5'; .*cc2, cc2s, cc3, cc4"),
        ({"bits": 3, "own": {"code": "cc2s"}}, "cc2s has 2 bits, not 3; use --bits 2, or cc3$"),
        ({"bits": 2, "own": {"code": "cc4"}}, "cc4 has 4 bits, not 2; .*or cc2 or cc2s$"),
        (
            {"bits": 2, "format": "fastdeploy-wint2", "own": {"code": "cc2"}},
            "code is of the format native; leave it out",
        ),
    ],
)
def test_names_that_do_not_go(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ErnieQuantError, match=said):
        check_options(QuantizeOptions(**options))
