"""Nothing of a checkpoint is executed: neither its Python files nor its pickles."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from harness import Bases, attempt
from mutate import EVIL_MODULE, Pickled

import erniequant

CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
PICKLES = ("pytorch_model.bin", "model.pt", "adapter_model.bin", "tokenizer.model")


@pytest.fixture(params=["plain", "packed"])
def folder(request: pytest.FixtureRequest, bases: Bases, tmp_path: Path) -> Path:
    target = tmp_path / "in"
    shutil.copytree(bases.folders[request.param], target)
    return target


def run_all(folder: Path, work: Path) -> list[str]:
    """Kinds of outcome of everything that reads a folder; quantising runs to the end."""
    options = {"bits": 2, "max_tp": 1, "effort": "fast", "threads": 1}
    few = {"calib_samples": 1, "calib_length": 8, **options}
    actions = (
        lambda: erniequant.load(folder, device="cpu"),
        lambda: erniequant.export(folder, work / "export"),
        lambda: erniequant.quantize(folder, work / "dry", dry_run=True, **options),
        lambda: erniequant.quantize(folder, work / "q", **few),
    )
    return [attempt(action)[0] for action in actions]


def plant_code(folder: Path, class_name: str) -> None:
    (folder / "evil.py").write_text(EVIL_MODULE)
    reference = f"evil.{class_name}"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(CLASSES, reference)
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [reference, reference]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_python_of_the_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    plant_code(folder, "Evil")
    kinds = run_all(folder, tmp_path)
    assert set(kinds) <= {"right", "refused"}
    assert not list(folder.glob("EXECUTED"))


def test_the_planted_code_would_tell(folder: Path) -> None:
    plant_code(folder, "Evil")
    exec(compile(EVIL_MODULE, str(folder / "evil.py"), "exec"), {"__file__": folder / "evil.py"})
    assert (folder / "EXECUTED").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_pickles_are_not_opened(folder: Path, tmp_path: Path, kept: bool) -> None:
    payload = pickle.dumps(Pickled(folder / "EXECUTED"))
    for name in PICKLES:
        (folder / name).write_bytes(payload)
    if not kept:
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            path.unlink()
    kinds = run_all(folder, tmp_path)
    assert set(kinds) <= {"right", "refused"}
    assert kept or set(kinds) == {"refused"}
    assert not (folder / "EXECUTED").exists()
    pickle.loads(payload)
    assert (folder / "EXECUTED").exists()


def test_a_pickle_in_place_of_safetensors(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(pickle.dumps(Pickled(folder / "EXECUTED")))
    assert set(run_all(folder, tmp_path)) == {"refused"}
    assert not (folder / "EXECUTED").exists()
