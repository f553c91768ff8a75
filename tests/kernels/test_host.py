"""Launches on the host, with Triton's compiler and without a device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from erniequant.errors import ErnieQuantError
from erniequant_kernels import launch
from erniequant_kernels.bench import host

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def probe():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "tests.kernels.host_probe"]
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "TRITON_DEFAULT_FP_FUSION" not in process.stderr, "a launch leaves fusion to Triton"
    return json.loads(process.stdout)


def test_launches_made_again_are_those_that_triton_makes(probe):
    # Other tensors each time, so an address that was kept shows.
    for tokens, found in probe["same_launches"].items():
        names = [kernel for kernel, *_ in found["ordinary"]]
        assert len(names) == 5, tokens
        assert found["again"] == found["ordinary"]
        ordinary, again = found["tensors passed"]
        assert ordinary > 0 and again == 0, "nothing was kept"


def test_pieces_of_the_workspace_do_not_overlap(probe):
    pieces = sorted(probe["pieces"])
    assert len(pieces) == 10  # the mask is one, which is elsewhere
    for (_, end), (start, _) in zip(pieces, pieces[1:], strict=False):
        assert end <= start


def test_inputs_that_begin_in_the_middle_of_16_bytes_are_compiled_for(probe):
    # The kernel that was compiled before loads 16 bytes at once. Only the first one reads inputs.
    found = probe["unaligned"]
    assert found["compiled"] == ["prepare_kernel"]
    assert found["tensors passed"] > 0


def test_after_the_warm_up_nothing_compiles(probe):
    found = probe["warmed_up"]
    assert len(found["ready"]) > len(set(found["ready"])) > 4
    assert found["late"] == []
    assert len(found["launched"]) == 5 and found["again"] == 0  # one token, once


def test_whoever_watches_launches_sees_them(probe):
    assert probe["watched"] > 0


def test_other_numbers_of_tokens_compile_little(probe):
    # 0.5 to 5 seconds each, in the middle of an answer.
    assert {what: count for what, count in probe["counts"].items() if count > 6} == {}


def test_kernels_that_start_early_wait_before_they_touch_memory(probe):
    # Memory may be in use until the kernel before has ended, and only sm_90 has the instruction.
    names = {"prepare", "packed_gemm", "fused_gemm", "swiglu_rotate", "combine"}
    for arch, kernels in probe["ordered"].items():
        assert {name for name, *_ in kernels} == {f"{name}_kernel" for name in names}
        for name, early, *done in kernels:
            assert early == (arch == "90")
            order = [what for what in done if what.startswith("griddepcontrol")]
            wait = ["griddepcontrol.wait"]
            # The last kernel does not let strangers start.
            first = [] if name == "combine_kernel" else ["griddepcontrol.launch_dependents"]
            expected = first + wait if early else []
            assert order == expected and done[: len(expected)] == expected, name
            assert len(done) > len(expected) + 1


def test_the_oldest_launches_go(probe):
    assert probe["forgotten"] == [True, True, False]


def test_a_capture_of_what_is_not_compiled_is_refused(probe):
    cold, ready = probe["capture"]["said"]
    assert "warm_up" in cold and "prepare_kernel" in cold
    assert ready == ""
    assert not probe["capture"]["hook left"]


def test_a_constant_is_not_built_in_a_capture(monkeypatch):
    built = []

    @launch.kept_on_device
    def constant(size):
        built.append(size)
        return torch.zeros(size)

    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    with pytest.raises(ErnieQuantError, match="warm_up"):
        constant(3)
    monkeypatch.setattr(launch, "is_capturing", lambda: False)
    kept = constant(3)
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    assert constant(3) is kept
    assert built == [3]


@pytest.mark.parametrize("given, found", [({}, True), ({"enable_fp_fusion": False}, False)])
def test_every_launch_says_whether_products_and_sums_are_rounded_once(given, found):
    options = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: options.append(constants)

    launch.launch(Kernel(), (1,), 3, WIDTH=4, **given)
    assert options == [{"WIDTH": 4, "enable_fp_fusion": found}]


def test_nothing_is_launched_in_another_way():
    folder = ROOT / "kernels/erniequant_kernels"
    direct = re.compile(r"_kernel\s*\[")
    found = {path.name for path in folder.rglob("*.py") if direct.search(path.read_text("utf-8"))}
    assert found == set()


def test_the_host_is_not_timed_in_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here")
    with pytest.raises(ErnieQuantError, match="TRITON_INTERPRET"), host.mocked_driver():
        pass
