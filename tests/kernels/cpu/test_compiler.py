"""Compiled code on disk: used again, never trusted when it is damaged, not needed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from erniequant.codes import get_code
from erniequant_kernels.cpu import compiler
from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.machine import VARIABLE, machine, machine_of
from erniequant_kernels.cpu.product import ProductSpec, product_module
from erniequant_kernels.cpu.rotation import RotationSpec, rotation_module

SPEC = RotationSpec(inputs=16, block=16, bfloat16=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def hadamard_row():
    """First row of the transform of a one at channel 0: a quarter everywhere."""
    rotate = compile_function(rotation_module(SPEC), "rotation", machine())
    x, out = torch.zeros(1, 16), torch.zeros(1, 16)
    x[0, 0] = 1
    rows, signs = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    rotate(1, *(tensor.data_ptr() for tensor in (rows, x, signs, out)))
    return out[0].tolist()


def test_code_is_kept_and_used_again(folder):
    assert hadamard_row() == [0.25] * 16
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    assert hadamard_row() == [0.25] * 16
    assert [f.stat().st_mtime_ns for f in folder.iterdir()] == [written]


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[:-1] + b"x"]
)
def test_damaged_code_is_made_anew(folder, damage):
    hadamard_row()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert hadamard_row() == [0.25] * 16
    assert file.read_bytes() == whole


def test_without_a_cache(folder, monkeypatch):
    folder.parent.joinpath("file").write_text("")
    for place in ("", str(folder.parent / "file" / "below")):
        monkeypatch.setenv(compiler.CACHE_VARIABLE, place)
        assert hadamard_row() == [0.25] * 16
    assert not folder.exists()


def test_machines_and_sources_do_not_share_code(folder):
    module = rotation_module(SPEC)
    others = [machine_of("haswell", {}), machine_of("haswell", {"avx512f": False})]
    files = {compiler._cache_file(module, on) for on in (machine(), *others)}
    files.add(compiler._cache_file(rotation_module(RotationSpec(16, 16, True)), machine()))
    assert len(files) == 4


def test_another_machine_by_environment():
    program = (
        "from erniequant_kernels.cpu.machine import machine; m = machine(); print(m.name, m.lanes)"
    )
    environment = os.environ | {VARIABLE: "haswell", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["haswell", "8"]


def test_default_folder(monkeypatch):
    monkeypatch.delenv(compiler.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiler.cache_folder() == Path("/somewhere/erniequant/cpu")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="code for AVX-512")
def test_products_stay_in_the_registers():
    # One token of two bits on AVX-512: sixteen sums, which no turn of the loop may store.
    on = machine_of("znver4", {"avx512f": True, "avx512vl": True, "avx512bf16": True})
    spec = ProductSpec(get_code("cc2", 12), 256, 2560, 1, bfloat16=True)
    code = compiler.assembly(product_module(spec, on), on)
    assert code.count("vdpbf16ps") == 16 and "zmm" in code
    (loop,) = (block for block in code.split(".LBB") if block.count("vdpbf16ps") == 16)
    assert "(%rsp)" not in loop.split("jb")[0]
