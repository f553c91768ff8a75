"""Count the memory accesses of compiled kernels by running their PTX on this machine.

``python -m erniequant_kernels.machine_traffic "packed_gemm cc2 L12 M16" --arch 90`` prints every
access of the cases whose label contains the text.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from erniequant.errors import ErnieQuantError
from erniequant_kernels.machine_code import WARP, KernelCost, compile_kernel, measure
from erniequant_kernels.machine_code_cases import Case, cases
from erniequant_kernels.ptx.accesses import (
    EPILOGUE,
    LOOP,
    PROLOGUE,
    Totals,
    Traffic,
    totals,
    traffic,
)  # fmt: skip
from erniequant_kernels.ptx.launch import Launched, launch

SCHEDULERS = 4
TURNS = 2
"""Turns of the main loop to run: the second one is like all that follow."""


@dataclass(frozen=True)
class Counted:
    """All that is counted of one case.

    Attributes:
        cost: its machine code.
        accesses: its memory instructions, in order.
        sections: their sums, by section of the code.
        warps, weights: of the case; weights that a program decodes in a turn.
        executed: instructions of PTX that the program executed, with the first turns of the loop;
            ``outside``: without any.
        matrices: rows, columns and depth of each matrix instruction of a turn of the main loop.
    """

    cost: KernelCost
    accesses: tuple[Traffic, ...]
    sections: Mapping[str, Totals]
    warps: int
    weights: int
    executed: int
    outside: int
    matrices: tuple[tuple[int, int, int], ...]

    def l1_clocks(self, turns: int, filled: float = 1.0) -> float:
        """Clocks of the level-1 pipe that a program of so many turns takes.

        Args:
            filled: share of the results that it stores: rows of a row tile that have a token.
        """
        outside = sum(
            self.sections[name].clocks - (1 - filled) * self.sections[name].store_clocks
            for name in (PROLOGUE, EPILOGUE)
        )
        return outside + turns * self.sections[LOOP].clocks

    def l1_cost(self, turns: int | None = None) -> float | None:
        """Issue slots of a lane per weight that pass meanwhile; of the main loop alone (or of a
        kernel without one) if no number of turns is given."""
        if not self.weights:
            return None
        slots = SCHEDULERS * WARP / self.weights
        if turns is None:
            return slots * self.sections[LOOP if self.cost.looped else PROLOGUE].clocks
        return slots * self.l1_clocks(turns) / turns


def compiled(case: Case, arch: int) -> Any:
    """The compiled kernel of a case."""
    return compile_kernel(
        case.kernel, case.arguments, case.constants, arch,
        num_warps=case.warps, num_stages=case.stages, fp_fusion=case.fp_fusion,
        registers=case.registers,
    )  # fmt: skip


def run_case(case: Case, kernel: Any) -> Launched:
    """Run one program of a case, the first turns of its main loop, and record its accesses.

    Raises:
        ErnieQuantError: an integer argument has no value.
        UnknownInstruction: the interpreter lacks an instruction.
    """
    arguments = {}
    for name, kind in case.arguments.items():
        if not kind.startswith("*") and name not in case.values:
            raise ErnieQuantError(f"{case.label}: no value for the argument {name}")
        arguments[name] = case.values.get(name)
    return launch(
        kernel.asm["ptx"], kernel.metadata.shared, case.grid, arguments,
        programs=[case.program], record=True, compute=False, most_turns=TURNS,
        busiest=case.busiest.ptx,
    )  # fmt: skip


def count(case: Case, arch: int) -> Counted:
    """Compile a case for ``sm_<arch>`` and count everything."""
    kernel = compiled(case, arch)
    cost = measure(
        kernel, arch, weights_per_iteration=case.weights, num_warps=case.warps,
        busiest=case.busiest,
    )  # fmt: skip
    launched = run_case(case, kernel)
    found = traffic(launched)
    by_place, loop = launched.machines[0].executed, launched.loop
    executed = sum(by_place.values())
    inside = sum(by_place[p] for p in range(loop.first, loop.last + 1)) if loop else 0
    sums = totals(launched, found)
    shapes = tuple(_matrix_shapes(launched))
    return Counted(
        cost, tuple(found), sums, case.warps, case.weights, executed, executed - inside, shapes
    )


def _matrix_shapes(launched: Launched) -> Iterator[tuple[int, int, int]]:
    program, loop = launched.program, launched.loop
    for instruction in program.instructions[loop.first : loop.last + 1] if loop else ():
        shape = re.search(r"mma.*\.m(\d+)n(\d+)k(\d+)", instruction.opcode)
        if shape:
            yield int(shape[1]), int(shape[2]), int(shape[3])


def lines(case: Case, arch: int) -> Iterator[str]:
    """A report on the accesses of one case."""
    counted = count(case, arch)
    cost = counted.cost
    yield (
        f"{case.label}, sm_{arch}: {cost.registers} registers, {cost.spill_bytes} bytes spilled, "
        f"{cost.shared_bytes} shared, {case.warps} warps"
    )
    if case.weights:
        yield (
            f"  slots a weight: issue {cost.issue_cost:.2f}, level 1 {counted.l1_cost():.2f}; "
            f"with prologue and epilogue after {case.turns} turns "
            f"{cost.cost_in_all(case.turns):.2f} and {counted.l1_cost(case.turns):.2f}"
        )
    for name, sums in counted.sections.items():
        if not sums.clocks:
            continue
        yield (
            f"  {name}: {sums.clocks:.0f} L1 clocks a program{' and turn' * (name == LOOP)}, "
            f"{sums.read_bytes:.0f} bytes read, {sums.written_bytes:.0f} written"
        )
        section = [one for one in counted.accesses if one.section == name]
        alike: Counter[tuple[str, ...]] = Counter()
        for one in section:
            alike[_described(one)] += 1
        for (mark, requests, what, instruction), times in alike.items():
            yield f"  {mark} {times:3} x {requests:>4} requests {what:60} {instruction}"


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
