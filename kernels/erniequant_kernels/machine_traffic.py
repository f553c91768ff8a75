"""Count the memory accesses of compiled kernels by running their PTX on this machine.

``python -m erniequant_kernels.machine_traffic "packed_gemm cc2 L12 M16" --arch 90`` prints every
access of the cases whose label contains the text.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from erniequant.errors import ErnieQuantError
from erniequant_kernels.machine_code import WARP, compile_kernel, measure
from erniequant_kernels.machine_code_budget import Case, cases
from erniequant_kernels.ptx.accesses import LOOP, SECTIONS, Traffic, clocks, traffic
from erniequant_kernels.ptx.launch import launch

SCHEDULERS = 4
TURNS = 2
"""Turns of the main loop to run: the second one is like all that follow."""


def compiled(case: Case, arch: int) -> Any:
    """The compiled kernel of a case."""
    return compile_kernel(
        case.kernel, case.arguments, case.constants, arch,
        num_warps=case.warps, num_stages=case.stages,
    )  # fmt: skip


def accesses(case: Case, kernel: Any) -> list[Traffic]:
    """The memory instructions of a program, in order.

    Raises:
        ErnieQuantError: an integer argument has no value.
        UnknownInstruction: the interpreter lacks an instruction.
    """
    arguments = {}
    for name, kind in case.arguments.items():
        if not kind.startswith("*") and name not in case.values:
            raise ErnieQuantError(f"{case.label}: no value for the argument {name}")
        arguments[name] = case.values.get(name)
    grid = (1 << 16, 1 << 8, 1)
    launched = launch(
        kernel.asm["ptx"], kernel.metadata.shared, grid, arguments,
        programs=[case.program], record=True, compute=False, most_turns=TURNS,
    )  # fmt: skip
    return traffic(launched)


def l1_slots(case: Case, section: Iterable[Traffic]) -> float:
    """Issue slots of a lane per weight that the level-1 pipe takes for some accesses."""
    return clocks(section) * SCHEDULERS * WARP / case.weights


def lines(case: Case, arch: int) -> Iterator[str]:
    """A report on the accesses of one case."""
    kernel = compiled(case, arch)
    found = accesses(case, kernel)
    cost = measure(kernel, arch, weights_per_iteration=case.weights, num_warps=case.warps)
    yield (
        f"{case.label}, sm_{arch}: {cost.registers} registers, {cost.spill_bytes} bytes spilled, "
        f"{cost.shared_bytes} shared, {case.warps} warps"
    )
    for name in SECTIONS:
        section = [one for one in found if one.section == name]
        if not section:
            continue
        total = f"  {name}: {clocks(section):.0f} L1 clocks a program"
        if name == LOOP:
            total += " and turn"
            if case.weights:
                total += f", {l1_slots(case, section):.2f} slots a weight beside the issue's"
                total += f" {cost.issue_cost:.2f}"
        yield total
        alike: Counter[tuple[str, ...]] = Counter()
        for one in section:
            alike[_described(one)] += 1
        for (mark, requests, what, instruction), count in alike.items():
            yield f"  {mark} {count:3} x {requests:>4} requests {what:60} {instruction}"


def _described(one: Traffic) -> tuple[str, str, str, str]:
    """Mark, requests, counts and opcode with its place: the same for accesses of one kind."""
    if one.space == "global":
        what = (
            f"{one.sectors:g} sectors (least {one.least_sectors:g}), {one.lines:g} lines, "
            f"{one.bytes:g} bytes"
        )
    else:
        what = f"{one.wavefronts:g} wavefronts, {one.conflicts:g} of them conflicts"
    opcode = next(part for part in one.instruction.split() if not part.startswith("@"))
    mark = "!" if one.uncoalesced or one.conflicts > 0 else " "
    return mark, f"{one.requests:g}", what, f"{opcode} {one.instruction.rpartition(' ')[2]}"


def main() -> None:
    """Print the accesses of some cases."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("label", help="text that the labels of the cases contain")
    parser.add_argument("--arch", type=int, default=90)
    arguments = parser.parse_args()
    for case in cases(arguments.arch):
        if arguments.label in case.label:
            print("\n".join(lines(case, arguments.arch)), flush=True)


if __name__ == "__main__":
    main()
