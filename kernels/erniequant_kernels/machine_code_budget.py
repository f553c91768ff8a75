"""The cost of every kernel in machine code, as the shipped tuning tables run it on 21B shapes.

Small-batch decoding on fast-memory cards is bound by instruction issue or by the level-1 pipe, so
both per decoded weight are the costs to watch. `check` compares them with the recorded budget
(budget.json).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import triton

from erniequant.errors import ErnieQuantError
from erniequant_kernels.machine_code import ARCHITECTURES
from erniequant_kernels.machine_code_cases import cases
from erniequant_kernels.packed_gemm import packed_gemm_kernel

DEFAULT_TOLERANCE = 0.02


def records(archs: Sequence[int] = ARCHITECTURES) -> Iterator[dict[str, Any]]:
    """Compile and count case by case.

    Raises:
        ErnieQuantError: Triton's interpreter is on, so nothing can be compiled.
    """
    if triton.knobs.runtime.interpret or not isinstance(packed_gemm_kernel, triton.JITFunction):
        raise ErnieQuantError("machine code needs Triton's compiler; unset TRITON_INTERPRET")
    for arch in archs:
        for case in cases(arch):
            cost = case.compile(arch)
            counted = {"issue_cost": cost.issue_cost, "per_weight": cost.per_weight}
            yield {"kernel": case.label, "triton": triton.__version__} | counted | asdict(cost)


def budget() -> dict[str, Any]:
    """Recorded costs: ``{"triton": version, "tolerance": t, "sm_90": {label: issue cost}}``."""
    text = resources.files("erniequant_kernels").joinpath("budget.json").read_text()
    return dict(json.loads(text))


def new_budget(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A budget from `records`."""
    result: dict[str, Any] = {"triton": triton.__version__, "tolerance": DEFAULT_TOLERANCE}
    for record in measured:
        if record["issue_cost"] is not None:
            costs = result.setdefault(f"sm_{record['arch']}", {})
            costs[record["kernel"]] = round(record["issue_cost"], 2)
    return result


def check(measured: Sequence[Mapping[str, Any]], allowed: Mapping[str, Any]) -> list[str]:
    """Problems, one line each: spills, no matrix instruction, more than the budget.

    Costs belong to one compiler: with another minor version of Triton only spills and matrix
    instructions are checked.
    """
    problems = []
    same_compiler = triton.__version__.split(".")[:2] == str(allowed["triton"]).split(".")[:2]
    for record in measured:
        name = f"sm_{record['arch']} {record['kernel']}"
        if record["spill_bytes"]:
            problems.append(f"{name}: {record['spill_bytes']} bytes of registers are spilled")
        if "gemm" in record["kernel"] and "MMA" not in record["matrix_opcode"]:
            problems.append(f"{name}: no matrix instruction in its main loop")
        if record["issue_cost"] is None or not same_compiler:
            continue
        limit = allowed.get(f"sm_{record['arch']}", {}).get(record["kernel"])
        if limit is None:
            problems.append(f"{name}: no budget recorded; add it to budget.json")
        elif record["issue_cost"] > limit + allowed["tolerance"]:
            problems.append(
                f"{name}: {record['issue_cost']:.2f} issue slots per weight, budget {limit:.2f}"
            )
    return problems
