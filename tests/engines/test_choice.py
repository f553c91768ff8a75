"""The choice of an engine: refused in one line where it cannot be, named by the plan, and a Ray
that is started for one command ends with it."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.quantization import engines
from tests.micro import CALIBRATION

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "dask"}, "there is no engine 'dask'; use local or ray"),
        ({"ray_address": "10.0.0.1:6379"}, "--ray-address is for --engine ray only"),
        ({"engine": "ray"}, r"needs Ray; pip install 'erniequant\[ray\]'"),
    ],
    ids=["unknown", "address", "missing"],
)
def test_refusals_come_before_the_work(
    micro_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ErnieQuantError, match=message):
        erniequant.quantize(micro_source, tmp_path / "q", bits=2, no_calib=True, **options)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("address", "where"), [(None, "one started here"), ("a:1", "the cluster at a:1")]
)
def test_the_plan_names_the_engine_without_starting_it(
    micro_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: Any, where: str
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    options: dict[str, Any] = {"bits": 2, "no_calib": True, "dry_run": True, **CALIBRATION}
    report = erniequant.quantize(
        micro_source, tmp_path / "q", engine="ray", ray_address=address, **options
    )
    assert f"\nengine ray, {where}: experts are quantised by its nodes" in report.plan_text
    local = erniequant.quantize(micro_source, tmp_path / "q", **options)
    assert "engine" not in local.plan_text


_PROGRAM = """
import os
from erniequant.quantization.ray_engine.cluster import connected
os.environ.pop("RAY_ADDRESS", None)
with connected(None, 3):
    import ray
    print(ray.cluster_resources()["CPU"], ray.get_runtime_context().get_node_id())
    print(ray._private.worker._global_node.get_session_dir_path())
print(ray.is_initialized())
"""


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
def test_a_cluster_of_our_own_ends_with_the_work(tmp_path: Path) -> None:
    from tests.engines.cluster import eventually, processes

    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cores, session, connected = done.stdout.splitlines()
    assert cores.split()[0] == "3.0" and connected == "False"
    assert Path(session).name.startswith("session_")
    assert eventually(lambda: not processes(session))
