"""Checkpoints that are refused by name, before weights are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization import get_quantization_config

from erniequant.errors import ErnieQuantError
from erniequant.packing.schema import QUANT_METHOD
from erniequant.serving.vllm import register
from tests.conftest import write_packed
from tests.serving.vllm.conftest import edited, specs
from tests.serving.vllm.harness import case, run_engines

Edit = Callable[[dict[str, torch.Tensor]], Any]
SCALE = "model.layers.2.mlp.experts.down_proj_scale"


@pytest.fixture(scope="module")
def config_class() -> Any:
    register()
    return get_quantization_config(QUANT_METHOD)


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return settings["quantization_config"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(SCALE), f"tensor {SCALE} is missing"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"), "q_proj.weight is missing"),
        (lambda t: t.update({SCALE: t[SCALE].float()}), f"{SCALE} has dtype F32"),
        (lambda t: t.update({"model.more": torch.zeros(1)}), "tensor model.more is not part"),
    ],
)
def test_a_tensor_that_is_missing_or_wrong(
    edit: Edit, said: str, folders: dict[str, Path], tmp_path: Path, config_class: Any
) -> None:
    folder = edited(folders["mixed"], tmp_path / "damaged", edit)
    config = config_class.from_config(settings_of(folder))
    with pytest.raises(ErnieQuantError, match=said):
        config.maybe_update_config(str(folder))
    config.maybe_update_config(str(folders["mixed"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 3}, "format_version 3, this erniequant reads 1 and 2"),
        ({"layers": {}}, "no layers"),
    ],
)
def test_descriptions_that_it_cannot_decode(
    change: dict[str, Any], said: str, folders: dict[str, Path], config_class: Any
) -> None:
    with pytest.raises(ErnieQuantError, match=said):
        config_class.from_config(settings_of(folders["mixed"]) | change)


def test_engines_stop_at_them(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same, from vLLM's side; and producers that are texts, as they once were, are read."""

    def rewritten(name: str, **changes: Any) -> Path:
        folder = edited(folders["mixed"], tmp_path / name, lambda tensors: None)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    missing = edited(folders["mixed"], tmp_path / "missing", lambda t: t.pop(SCALE))
    found = run_engines(
        tmp_path / "home",
        case("missing", missing, fails=True),
        case("newer", rewritten("newer", format_version=3), fails=True),
        case("text", rewritten("text", producer="erniequant 0.1.0"), steps=1),
    )
    assert f"tensor {SCALE} is missing" in found["missing"]["error"]
    assert "format_version 3" in found["newer"]["error"]
    assert found["text"]["said"] and found["log"].count("Loading weights took") == 1


def test_ranks_that_would_cut_a_tile(folders: dict[str, Path], tmp_path: Path) -> None:
    """An inner size of 128 is one tile of 128, as --max-tp 1 makes them."""
    whole = {"1": (("cc2", 12, 128, 32), ("cc2", 12, 32, 64))}
    folder = write_packed(folders["plain"], tmp_path / "whole", specs(whole))
    found = run_engines(tmp_path / "home", case("whole", folder, ranks=2, fails=True))
    assert "so 128 cannot be divided among 2 ranks; quantise with --max-tp 2" in found["log"]
    assert "Loading weights took" not in found["log"]
