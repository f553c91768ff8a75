"""What a user's `pip install` puts where, seen from a fresh environment and from any folder.

The fresh environment borrows this one's third-party packages through a .pth file, so nothing is
downloaded; erniequant itself comes from the wheel alone.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"erniequant", "erniequant_cli", "erniequant_data", "erniequant_kernels"}


def call(*command, **options):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tree because a build writes beside its sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    call(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", target, source),
    )
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of an environment with the wheel and, after it on the path, this one's packages."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    target = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    call(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"),
        *("--no-index", "--no-compile", wheel),
    )
    borrowed = sysconfig.get_path("purelib")
    (target / "borrowed.pth").write_text(borrowed + "\n")
    # site.addsitedir never sees the editable install of `borrowed`: .pth files do not nest.
    return python, target


def test_only_our_four_packages_land(installed):
    _, target = installed
    top = {p.name for p in target.iterdir() if not p.name.endswith((".dist-info", ".pth"))}
    assert top == PACKAGES


def test_wheel_carries_types_data_and_no_sources_of_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("erniequant", "erniequant_cli"):
        assert f"{package}/py.typed" in names
    tracked = call("git", "ls-files", "calib_data/erniequant_data", cwd=ROOT).split("\n")
    expected = {n.removeprefix("calib_data/") for n in tracked if n}
    assert expected <= set(names)
    assert any(n.endswith(".safetensors") for n in expected)
    assert not [n for n in names if n.split("/")[0] in {"kernels", "cli", "tests", "calib_data"}]


def test_every_module_of_the_tree_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for root, package in (
        (ROOT, "erniequant"),
        (ROOT / "cli", "erniequant_cli"),
        (ROOT / "kernels", "erniequant_kernels"),
        (ROOT / "calib_data", "erniequant_data"),
    ):
        modules = {p.relative_to(root).as_posix() for p in (root / package).rglob("*.py")}
        assert modules and modules <= names


def test_transformers_imports_ernie_from_the_repository_root(installed):
    # transformers imports Hugging Face's `kernels`; from here a folder of that name is on the path.
    python, _ = installed
    module = "transformers.models.ernie4_5_moe.modeling_ernie4_5_moe"
    call(python, "-c", f"import sys; sys.path.insert(0, ''); import {module}", cwd=ROOT)


def test_data_is_found_from_any_folder(installed, tmp_path):
    python, target = installed
    script = (
        "import json, erniequant_data as d\n"
        "from pathlib import Path\n"
        "model = Path(d.tiny_model_dir())\n"
        "print(json.dumps([str(model), sorted(p.name for p in model.iterdir()),"
        " len(d.heldout_text())]))"
    )
    model, files, letters = json.loads(call(python, "-c", script, cwd=tmp_path))
    assert Path(model).is_relative_to(target)
    assert {"config.json", "tokenizer.json"} <= set(files)
    assert any(name.endswith(".safetensors") for name in files)
    assert letters > 10_000


def test_command_works_from_any_folder(installed, tmp_path):
    python, target = installed
    command = python.with_name("erniequant")
    assert "--keep-models" in call(command, "demo", "--help", cwd=tmp_path)
    where = "import erniequant, erniequant_cli; print(erniequant.__file__, erniequant_cli.__file__)"
    for file in call(python, "-c", where, cwd=tmp_path).split():
        assert Path(file).is_relative_to(target)
    assert list(tmp_path.iterdir()) == []


def test_version_is_said_once(installed, tmp_path):
    python, _ = installed
    said = call(
        *(python, "-c", "import erniequant; print(erniequant.__version__)"), cwd=tmp_path
    ).strip()
    assert call(python.with_name("erniequant"), "--version", cwd=tmp_path) == f"erniequant {said}\n"
