"""Machine code of every kernel, in a fresh process: the interpreter compiles nothing."""

import json
import os
import subprocess
import sys

import pytest

from erniequant_kernels import machine_code_budget as static
from erniequant_kernels.machine_code import ARCHITECTURES


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """`erniequant bench static --check` as a user runs it, for both architectures at once: it
    must find nothing. What Triton compiled before, of the same source, it takes from its cache."""
    folder = tmp_path_factory.mktemp("static")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", "from erniequant_cli.main import main; main()"]
    command += ["bench", "static", "--check", "--quiet"]
    running = {}
    for arch in ARCHITECTURES:
        # The compiler works on one core.
        options = ["--arch", str(arch), "--json", str(folder / f"{arch}.json")]
        running[arch] = subprocess.Popen(
            [*command, *options], env=environment, stderr=subprocess.PIPE, text=True
        )
    found = []
    for arch, process in running.items():
        _, complaints = process.communicate()
        assert process.returncode == 0, complaints
        found += json.loads((folder / f"{arch}.json").read_text())["records"]
    return found


def only(records, arch, text):
    found = [r for r in records if r["arch"] == arch and text in r["kernel"]]
    assert found, text
    return found


def test_both_architectures_and_every_kernel_are_counted(records):
    kinds = {"packed_gemm", "expand", "dense_gemm", "prepare", "swiglu_rotate", "combine"}
    for arch in (80, 90):
        names = {r["kernel"].split()[0] for r in records if r["arch"] == arch}
        assert names == kinds


@pytest.mark.parametrize("code, bar", [("cc2", 4.0), ("cc4", 5.0)])
def test_products_stay_below_what_memory_takes(records, code, bar):
    # Sixteen tokens on sm_90: beyond these, two and four bits wait for instructions, not memory.
    for record in only(records, 90, f"packed_gemm {code}"):
        if record["kernel"].endswith("M32"):
            continue  # twice the tokens for one decoding
        assert record["issue_cost"] <= bar
        assert record["spill_bytes"] == 0
        assert "MMA" in record["matrix_opcode"]


def test_no_weight_crosses_lanes_or_memory(records):
    # What goes to shared memory are words and inputs, by asynchronous copies; a store in the loop
    # would be a weight that changes lanes.
    for record in records:
        if record["kernel"].startswith("packed_gemm"):
            assert not any(name.startswith(("STS", "STSM")) for name in record["opcodes"])


def test_counts_are_those_of_all_weights(records):
    # One matrix instruction (16 rows, 8 columns) multiplies 32 lanes x 4 products. Fewer a weight
    # would mean that two steps were cut from the same bits and the compiler merged them.
    for code, tokens, expected in (("cc2", 8, 0.25), ("cc2", 16, 0.5), ("cc4", 8, 0.25)):
        for record in only(records, 90, f"packed_gemm {code} L12 M{tokens}" if code == "cc2"
                           else f"packed_gemm {code} L13 M{tokens}"):  # fmt: skip
            assert record["per_weight"]["matrix"] == expected
            # A product takes a multiplication, a mask and the cutting of its window at the least.
            assert record["per_weight"]["all"] >= (1.5 if code == "cc2" else 3)


def record(**changes):
    base = {
        "arch": 90, "kernel": "packed_gemm cc2 L12 M16", "issue_cost": 3.0, "spill_bytes": 0,
        "matrix_opcode": "HMMA",
    }  # fmt: skip
    return base | changes


def allowed(version=None):
    import triton

    costs = {"packed_gemm cc2 L12 M16": 3.0}
    return {"triton": version or triton.__version__, "tolerance": 0.02, "sm_90": costs}


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"issue_cost": 3.03}, "budget 3.00"),
        ({"spill_bytes": 8}, "8 bytes of registers"),
        ({"matrix_opcode": ""}, "no matrix instruction"),
        ({"kernel": "packed_gemm cc9"}, "no budget recorded"),
    ],
)
def test_check_names_what_is_wrong(changes, complaint):
    (problem,) = static.check([record(**changes)], allowed())
    assert complaint in problem and "sm_90" in problem


def test_check_accepts_the_budget_and_ignores_the_costs_of_another_compiler():
    assert static.check([record()], allowed()) == []
    assert static.check([record(issue_cost=9.0)], allowed("1.0.0")) == []
    assert static.check([record(issue_cost=9.0, spill_bytes=4)], allowed("1.0.0")) != []


def test_nothing_is_counted_in_the_interpreter(monkeypatch):
    import triton

    from erniequant.errors import ErnieQuantError

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # off where a GPU is
    with pytest.raises(ErnieQuantError, match="TRITON_INTERPRET"):
        next(static.records())
