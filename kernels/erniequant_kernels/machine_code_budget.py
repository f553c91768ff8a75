"""The cost of every kernel in machine code, as the shipped tuning tables run it on 21B shapes.

Small batches wait for instruction issue or for the level-1 pipe, so both per decoded weight are the
costs to watch, in the main loop and with what is around it. `check` compares these and what leads
to them with the recorded budget (budget.json).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import resources
from multiprocessing import get_context
from typing import Any

import triton

from erniequant.errors import ErnieQuantError
from erniequant_kernels.machine_code import ARCHITECTURES
from erniequant_kernels.machine_code_cases import Case, cases
from erniequant_kernels.machine_traffic import Counted, count
from erniequant_kernels.packed_gemm import packed_gemm_kernel
from erniequant_kernels.ptx.accesses import LOOP, PROLOGUE

TOLERANCES = {
    "slots": 0.02, "slots_in_all": 0.02, "l1_slots": 0.02, "l1_slots_in_all": 0.02,
    "instructions": 4, "l1_clocks": 2, "sectors_per_request": 0.05, "uncoalesced": 0,
    "conflicts": 0, "registers": 8,
}  # fmt: skip
"""How much each figure may grow before `check` fails. Compilers of one minor version agree to this;
registers matter in steps of eight."""


def figures(case: Case, counted: Counted) -> dict[str, float]:
    """What a budget holds of a kernel, by the names of `TOLERANCES`.

    Issue slots of a lane per weight, in the main loop and in all (``slots``, ``slots_in_all``), and
    those that pass while the level-1 pipe is busy (``l1_slots``, ``l1_slots_in_all``); for a kernel
    that decodes nothing, instructions and level-1 clocks of a program. Then of the main loop, or of
    a kernel without one: sectors per request to global memory, requests that are not coalesced and
    clocks lost to conflicts in shared memory, both per program and turn.
    """
    cost = counted.cost
    section = counted.sections[LOOP if cost.looped else PROLOGUE]
    found: dict[str, float | None] = {
        "slots": cost.issue_cost,
        "slots_in_all": cost.cost_in_all(case.turns),
        "l1_slots": counted.l1_cost(),
        "l1_slots_in_all": counted.l1_cost(case.turns),
    }
    if not case.weights:
        found |= {"instructions": cost.slots + cost.once, "l1_clocks": counted.l1_clocks(1)}
    found |= {
        "sectors_per_request": section.sectors / max(1.0, section.requests),
        "uncoalesced": section.uncoalesced,
        "conflicts": section.conflicts,
        "registers": cost.registers,
    }
    return {name: value for name, value in found.items() if value is not None}


def record(case: Case, arch: int) -> dict[str, Any]:
    """Everything that is counted of a case, as JSON can hold it."""
    counted = count(case, arch)
    cost = counted.cost
    return {
        "kernel": case.label, "triton": triton.__version__, "issue_cost": cost.issue_cost,
        "per_weight": cost.per_weight, "figures": figures(case, counted), "turns": case.turns,
        "sections": {name: asdict(sums) for name, sums in counted.sections.items()},
        "uncoalesced": [
            asdict(one) for one in counted.accesses if one.uncoalesced and one.section == LOOP
        ],
        **asdict(cost),
    }  # fmt: skip


def _record_of(place: tuple[int, str]) -> dict[str, Any]:
    """In another process, where a case cannot be sent."""
    arch, label = place
    return record(next(case for case in cases(arch) if case.label == label), arch)


def records(archs: Sequence[int] = ARCHITECTURES, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Compile and count case by case.

    Args:
        processes: that compile at the same time.

    Raises:
        ErnieQuantError: Triton's interpreter is on, so nothing can be compiled.
    """
    if triton.knobs.runtime.interpret or not isinstance(packed_gemm_kernel, triton.JITFunction):
        raise ErnieQuantError("machine code needs Triton's compiler; unset TRITON_INTERPRET")
    if processes < 2:
        yield from (record(case, arch) for arch in archs for case in cases(arch))
        return
    places = [(arch, case.label) for arch in archs for case in cases(arch)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_record_of, places)


def budget() -> dict[str, Any]:
    """Recorded costs: ``{"triton": version, "sm_90": {label: {figure: value}}}``."""
    text = resources.files("erniequant_kernels").joinpath("budget.json").read_text()
    return dict(json.loads(text))


def new_budget(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A budget from `records`."""
    result: dict[str, Any] = {"triton": triton.__version__}
    for one in measured:
        costs = result.setdefault(f"sm_{one['arch']}", {})
        costs[one["kernel"]] = {name: round(value, 2) for name, value in one["figures"].items()}
    return result


def check(measured: Sequence[Mapping[str, Any]], allowed: Mapping[str, Any]) -> list[str]:
    """Problems, one line each: spills, no matrix instruction, a figure above the budget.

    Figures belong to one compiler: with another minor version of Triton only spills and matrix
    instructions are checked.
    """
    problems = []
    same_compiler = triton.__version__.split(".")[:2] == str(allowed["triton"]).split(".")[:2]
    for one in measured:
        name = f"sm_{one['arch']} {one['kernel']}"
        if one["spill_bytes"]:
            problems.append(f"{name}: {one['spill_bytes']} bytes of registers are spilled")
        if "gemm" in one["kernel"] and "MMA" not in one["matrix_opcode"]:
            problems.append(f"{name}: no matrix instruction in its main loop")
        if not same_compiler:
            continue
        limits = allowed.get(f"sm_{one['arch']}", {}).get(one["kernel"])
        if limits is None:
            problems.append(f"{name}: no budget recorded; add it to budget.json")
            continue
        for figure, value in one["figures"].items():
            limit = limits.get(figure, 0.0)
            # Recorded figures are rounded to two digits.
            if value > limit + TOLERANCES[figure] + 0.005:
                words = figure.replace("_", " ")
                problems.append(f"{name}: {words} {value:.2f}, budget {limit:.2f}")
    return problems
