"""Machine code of every kernel, in a fresh process: the interpreter compiles nothing."""

import json
import os
import subprocess
import sys

import pytest

from erniequant.codes.registry import CODES
from erniequant_kernels import machine_code_budget as static
from erniequant_kernels.machine_code import ARCHITECTURES


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """`erniequant bench static --check` as a user runs it: it must find nothing. What Triton
    compiled before, of the same source, it takes from its cache."""
    report = tmp_path_factory.mktemp("static") / "static.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", "from erniequant_cli.main import main; main()"]
    command += ["bench", "static", "--check", "--quiet", "--json", str(report)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())["records"]


def only(records, arch, text):
    found = [r for r in records if r["arch"] == arch and text in r["kernel"]]
    assert found, text
    return found


def test_both_architectures_and_every_kernel_are_counted(records):
    kinds = {"packed_gemm", "fused_gemm", "prepare", "swiglu_rotate", "combine", "viterbi"}
    for arch in ARCHITECTURES:
        names = {r["kernel"].split()[0] for r in records if r["arch"] == arch}
        assert kinds <= names


@pytest.mark.parametrize("code, bar", [("cc2", 3.3), ("cc2s", 5.3), ("cc4", 5.5)])
def test_products_of_few_tokens_stay_below_their_bar(records, code, bar):
    # Sixteen tokens on sm_90, where two and four bits wait for instructions and not for memory:
    # issue slots with prologue and epilogue, and what the level-1 pipe takes for all accesses.
    for record in only(records, 90, f"packed_gemm {code} "):
        assert "MMA" in record["matrix_opcode"]
        if " M16 " in record["kernel"]:
            assert record["figures"]["slots_in_all"] <= bar
            assert record["figures"]["l1_slots_in_all"] <= bar


def test_main_loops_use_all_bytes_that_they_fetch(records):
    # All but the sector before a program's block in each input row, which holds the bits before the
    # first group.
    for record in records:
        if record["kernel"].startswith("viterbi"):
            assert not record["uncoalesced"]
        for access in record["uncoalesced"]:
            block_k = next(int(w[1:]) for w in record["kernel"].split() if w.startswith("K"))
            assert access["wasted_sectors"] <= block_k, (record["kernel"], access)


# The matrix instruction itself takes 4 slots a weight of 64 tokens on sm_90 and 8 on sm_80.
@pytest.mark.parametrize(
    "arch, code, bar",
    [(90, "cc2 L12", 2.9), (90, "cc2s L12", 6.9), (90, "cc4 L13", 7.1), (80, "cc2 L12", 4.1)],
)
def test_products_of_many_tokens_stay_below_their_bar(records, arch, code, bar):
    for record in only(records, arch, f"fused_gemm {code} M64 "):
        assert record["matrix_opcode"].startswith("HGMMA" if arch == 90 else "HMMA")
        assert record["figures"]["slots"] <= bar


@pytest.mark.parametrize("code, weights", [("cc2", 2), ("cc2s", 1), ("cc3", 1), ("cc4", 1)])
def test_a_search_takes_few_instructions_a_branch(records, code, weights):
    # Two fused additions for each weight and a minimum, as there are no cheaper ones; where lanes
    # have classes for all, loads, stores and addresses add less than half as much.
    for arch in ARCHITECTURES:
        for record in only(records, arch, f"viterbi {code} "):
            assert not record["spill_bytes"]
            if " L10 " not in record["kernel"]:
                assert 2 * weights + 1 < record["figures"]["slots"] <= 1.6 * (2 * weights + 1)
            assert record["figures"]["l1_slots"] < record["figures"]["slots"]
            fused = record["opcodes"]["FFMA"] / record["weights_per_lane"]
            assert 2 * weights <= fused <= 4.5 * weights


def test_no_weight_crosses_lanes_or_memory(records):
    # What goes to shared memory are words and inputs, by asynchronous copies; a store in the loop
    # would be a weight that changes lanes.
    for record in records:
        if record["kernel"].startswith("packed_gemm"):
            assert not any(name.startswith(("STS", "STSM")) for name in record["opcodes"])


def test_counts_are_those_of_all_weights(records):
    # One matrix instruction (16 rows, 8 columns) multiplies 32 lanes x 4 products. Fewer a weight
    # would mean that two steps were cut from the same bits and the compiler merged them.
    for code, tokens, expected in (
        ("cc2 L12", 8, 0.25),
        ("cc2 L12", 16, 0.5),
        ("cc2s L12", 8, 0.25),
        ("cc4 L13", 8, 0.25),
    ):
        for record in only(records, 90, f"packed_gemm {code} M{tokens} "):
            assert record["per_weight"]["matrix"] == expected
            # A product takes a multiplication, a mask and the cutting of its window at the least.
            assert record["per_weight"]["all"] >= (1.5 if code == "cc2 L12" else 3)


def test_a_turn_reads_all_of_its_words(records):
    # Bits of the weights that a program decodes in a turn, and inputs in bfloat16 for its tokens:
    # what passes the level-2 cache is that and the words before runs, at most half as much again.
    for record in records:
        if not record["kernel"].startswith(("packed_gemm", "fused_gemm")):
            continue
        kernel, *sizes = record["kernel"].split()
        size = {part[0]: int(part[1:]) for part in sizes if not part.startswith("cc")}
        block_m, block_k, warps = size["M"], size["K"], size["W"]
        if kernel == "wint2_gemm":
            # Two groups a turn, with a nibble for 64 weights, in parts of K inputs.
            bits, block_k = 2 + 4 / 64, 128
        else:
            bits = CODES[sizes[0]].bits
        weights = record["weights_per_lane"] * 32 * warps
        least = weights * bits / 8 + 2 * block_k * block_m
        # The loop's loads of its last turn are masked, and of two turns one is run again.
        assert 0.5 * least <= record["sections"]["loop"]["read_bytes"] <= 1.5 * least


FIGURES = {"slots": 3.0, "l1_slots": 1.5, "uncoalesced": 0, "conflicts": 4, "registers": 128}


def record(figures=None, **changes):
    base = {
        "arch": 90, "kernel": "packed_gemm cc2 L12 M16", "spill_bytes": 0, "matrix_opcode": "HMMA",
        "figures": FIGURES | (figures or {}),
    }  # fmt: skip
    return base | changes


def allowed(version=None):
    import triton

    costs = {"packed_gemm cc2 L12 M16": dict(FIGURES)}
    return {"triton": version or triton.__version__, "sm_90": costs}


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"figures": {"slots": 3.03}}, "slots 3.03, budget 3.00"),
        ({"figures": {"l1_slots": 1.6}}, "l1 slots 1.60, budget 1.50"),
        ({"figures": {"uncoalesced": 1}}, "uncoalesced 1.00, budget 0.00"),
        ({"figures": {"conflicts": 5}}, "conflicts 5.00"),
        ({"figures": {"registers": 144}}, "registers 144"),
        # A figure that the budget does not have is one that must be zero.
        ({"figures": {"sectors_per_request": 4}}, "sectors per request 4.00, budget 0.00"),
        ({"spill_bytes": 8}, "8 bytes of registers"),
        ({"matrix_opcode": ""}, "no matrix instruction"),
        ({"kernel": "packed_gemm cc9"}, "no budget recorded"),
    ],
)
def test_check_names_what_is_wrong(changes, complaint):
    (problem,) = static.check([record(**changes)], allowed())
    assert complaint in problem and "sm_90" in problem


def test_check_accepts_the_budget_and_ignores_the_figures_of_another_compiler():
    assert static.check([record()], allowed()) == []
    assert static.check([record({"slots": 2.5, "registers": 136})], allowed()) == []
    assert static.check([record({"slots": 9.0})], allowed("1.0.0")) == []
    assert static.check([record({"slots": 9.0}, spill_bytes=4)], allowed("1.0.0")) != []


def test_every_figure_has_a_tolerance_and_a_new_budget_accepts_itself():
    assert set(FIGURES) <= set(static.TOLERANCES)
    own = static.new_budget([record({"slots": 3.0049})])
    assert static.check([record({"slots": 3.0049})], own) == []


def test_nothing_is_counted_in_the_interpreter(monkeypatch):
    import triton

    from erniequant.errors import ErnieQuantError

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # off where a GPU is
    with pytest.raises(ErnieQuantError, match="TRITON_INTERPRET"):
        next(static.records())
