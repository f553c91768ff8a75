"""Machine code of the fused product, compiled in fresh processes: the interpreter compiles nothing.

Budgets of every configuration in use are `test_static.py`'s; here is what holds by design.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import NamedTuple

import pytest

from erniequant.codes import get_code
from erniequant_kernels import decode
from erniequant_kernels.fused_gemm import fused_gemm_kernel
from erniequant_kernels.machine_code import compile_kernel, measure

# Gate and up of the 21B model; programs of a whole tile of 256 outputs.
INPUTS, OUTPUTS, TILE = 2560, 3072, 256


class Case(NamedTuple):
    """A code in programs of ``tokens`` by a tile, and the most issue slots that a weight takes."""

    arch: int
    code: str
    length: int
    tokens: int
    block_k: int
    slots: float


# The matrix instruction itself takes 4 slots a weight of 64 tokens on sm_90 and 8 on sm_80. Two
# bits stay below them; others stay below what 64 tokens took with weights as the first operand.
CASES = (
    Case(90, "cc2", 12, 32, 64, 3.3),
    Case(90, "cc2", 12, 64, 64, 2.9),
    Case(90, "cc3", 13, 64, 64, 7.1),
    Case(90, "cc4", 13, 64, 64, 6.5),
    Case(80, "cc2", 12, 64, 32, 4.0),
    Case(80, "cc4", 13, 64, 32, 7.8),
)


def count(arch):
    """Print the cost of every case of an architecture as JSON; runs in a process of its own."""
    tables = ("order_ptr", "tile_expert_ptr", "tile_first_ptr", "tile_end_ptr")
    arguments = {"x_ptr": "*bf16", "packed_ptr": "*i32", "constants_ptr": "*i32"}
    arguments |= dict.fromkeys(tables, "*i32") | {"out_ptr": "*bf16"}
    costs = []
    for case in CASES:
        if case.arch != arch:
            continue
        code = get_code(case.code, case.length)
        constants = {
            "TOP_K": 6, "INPUTS": INPUTS, "OUTPUTS": OUTPUTS,
            "TILE_WORDS": code.words_per_sequence(TILE), "BLOCK_M": case.tokens, "BLOCK_N": TILE,
            "BLOCK_K": case.block_k,
        } | decode.code_constants(code)  # fmt: skip
        compiled = compile_kernel(
            fused_gemm_kernel, arguments, constants, arch, num_warps=4, num_stages=3
        )
        cost = measure(compiled, arch, weights_per_iteration=TILE * case.block_k, num_warps=4)
        stores = [line for line in compiled.asm["ptx"].splitlines() if "st.global" in line]
        wide = [line for line in stores if "st.global.v4.b32" in line]
        costs.append(asdict(cost) | {"stores": len(stores), "wide_stores": len(wide)})
    print(json.dumps(costs))


@pytest.fixture(scope="module")
def costs():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = "from tests.kernels.test_fused_static import count; count({})"
    running = {
        arch: subprocess.Popen(
            [sys.executable, "-c", program.format(arch)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for arch in (80, 90)
    }  # fmt: skip
    found = {}
    for arch, process in running.items():
        printed, _ = process.communicate()
        assert process.returncode == 0
        mine = [case for case in CASES if case.arch == arch]
        found |= dict(zip(mine, json.loads(printed), strict=True))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_stays_below_its_bar(costs, case):
    cost = costs[case]
    assert cost["spill_bytes"] == 0
    busiest = max(cost["instructions"], 2 * cost["alu"], 2 * cost["multiply"])
    assert busiest / cost["weights_per_lane"] <= case.slots
    # A warp group multiplies at twice the rate of its warps, but no fewer than 64 tokens.
    grouped = case.arch == 90 and case.tokens >= 64
    assert cost["matrix_opcode"].startswith("HGMMA" if grouped else "HMMA")


def test_weights_and_results_are_stored_by_sixteen_bytes(costs):
    for cost in costs.values():
        stored = {name: n for name, n in cost["opcodes"].items() if name.startswith("STS")}
        assert stored == {"STS.128": cost["weights_per_lane"] / 8}
        assert cost["stores"] == cost["wide_stores"] > 0


def test_a_pair_of_weights_is_stored_as_the_product_that_holds_it(costs):
    for case, cost in costs.items():
        if case.code == "cc2":
            assert "PRMT" not in cost["opcodes"]
