"""Damaged checkpoints of FastDeploy are refused in one line, or read as far as they can be."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import erniequant
from erniequant.formats.fastdeploy import export_bf16
from erniequant.formats.fastdeploy.inspect import inspect_fastdeploy
from erniequant.formats.fastdeploy.verify import verify_fastdeploy
from testing.micro_model import write_micro_ernie

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from harness import attempt  # noqa: E402
from mutate import mutate  # noqa: E402

CASES = 160
IDS = torch.tensor([[1, 5, 9, 30, 77, 77, 2]])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    source = write_micro_ernie(
        root / "source", hidden_size=128, intermediate_size=128, moe_intermediate_size=128,
        moe_num_experts=2, moe_k=1, num_hidden_layers=2, moe_layer_end_index=1,
    )  # fmt: skip
    erniequant.quantize(
        source, root / "q", bits=2, format="fastdeploy-wint2", w4_layers=0, no_calib=True
    )
    return root / "q"


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return erniequant.load(folder, device="cpu")[0](IDS).logits


RUN: dict[str, Callable[[Path], Any]] = {
    "load": logits,
    "verify": verify_fastdeploy,
    "inspect": inspect_fastdeploy,
    "export": lambda folder: export_bf16(folder, folder.parent / "out"),
}


@pytest.mark.parametrize("target", RUN)
def test_nothing_escapes(sound: Path, tmp_path: Path, target: str) -> None:
    outcomes = []
    for case in range(CASES // len(RUN)):
        work = tmp_path / str(case)
        shutil.copytree(sound, work / "in")
        # The same cases every time: what a day's seed would find belongs into the soak.
        done = mutate(work / "in", random.Random(f"{target} {case}"))
        kind, found = attempt(lambda folder=work / "in": RUN[target](folder))  # type: ignore[misc]
        assert kind in ("right", "refused"), (case, done, found)
        outcomes.append(kind)
        shutil.rmtree(work)
    # Neither refusing nor accepting everything would say much.
    assert 0.1 < outcomes.count("right") / len(outcomes) < 0.9


def damaged(sound: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(sound, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(moe_num_experts=10**9),
        lambda c: c.update(num_hidden_layers="2"),
        lambda c: c["quantization_config"]["moe_quant_config"].update(moe_w4_quant_config=3),
        lambda c: c["erniequant"].update(k_order="sideways"),
        lambda c: c["erniequant"].update(tensor_parallel=2),
        lambda c: c.update(moe_k=0),
    ],
)
def test_settings_that_do_harm_are_refused(
    sound: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    folder = damaged(sound, tmp_path / "q", edit)
    for target in RUN.values():
        assert attempt(lambda target=target: target(folder))[0] == "refused"  # type: ignore[misc]
