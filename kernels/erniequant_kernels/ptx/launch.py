"""Launch a compiled kernel in the interpreter on arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from erniequant.errors import ErnieQuantError
from erniequant_kernels.ptx.code import translate
from erniequant_kernels.ptx.machine import Execute, Machine, run
from erniequant_kernels.ptx.memory import Memory, SharedMemory
from erniequant_kernels.ptx.parse import Program, parse

LANES_AT_ONCE = 4096
"""Of as many programs as a machine runs together: their registers stay in this machine's caches."""
MATRIX = ("mma.sync", "wgmma.mma_async")
"""Opcodes, as they begin, of the instructions that products spend their time on."""


@dataclass(frozen=True)
class Section:
    """A loop: instructions ``first`` to ``last``, whose last one branches back."""

    first: int
    last: int


def main_loop(program: Program, busiest: tuple[str, ...] = MATRIX) -> Section | None:
    """Of the loops that hold no other loop, the one with the most instructions of some opcodes, if
    any has one."""
    backward = [
        Section(target, place)
        for place, instruction in enumerate(program.instructions)
        if instruction.opcode.startswith("bra")
        and (target := program.labels[instruction.operands[0]]) <= place
    ]
    best, best_key = None, (0, 0)
    for loop in backward:
        if any(loop.first <= other.first and other.last < loop.last for other in backward):
            continue
        body = program.instructions[loop.first : loop.last + 1]
        key = (sum(i.opcode.startswith(busiest) for i in body), -len(body))
        if key > best_key:
            best, best_key = loop, key
    return best


@lru_cache(maxsize=64)
def _prepared(ptx: str) -> tuple[Program, list[Execute]]:
    program = parse(ptx)
    return program, translate(program)


@dataclass(frozen=True)
class Launched:
    """A finished launch: its main loop, its machines, one after the other, and what each array
    holds now."""

    program: Program
    loop: Section | None
    machines: tuple[Machine, ...]
    arrays: Mapping[str, Any]

    @property
    def turns(self) -> int:
        """Turns of the main loop that a program made; 1 without one."""
        return max(1, self.machines[0].executed[self.loop.last]) if self.loop else 1


def launch(
    ptx: str,
    shared_bytes: int,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Any],
    *,
    programs: Sequence[tuple[int, int, int]] | None = None,
    record: bool = False,
    compute: bool = True,
    late: bool = True,
    most_turns: int | None = None,
    busiest: tuple[str, ...] = MATRIX,
) -> Launched:
    """Run programs of a grid.

    Args:
        arguments: in order: a numpy array for a pointer, None for one whose memory reads as zeros,
            or an integer.
        programs: the programs to run, all by default.
        record: keep memory accesses.
        compute: execute matrix instructions.
        late: asynchronous copies arrive as late as possible, else at once.
        most_turns: leave the main loop after that many turns, and after one if it comes again.
        busiest: opcodes by which the main loop is found, see `main_loop`.

    Raises:
        UnknownInstruction: the kernel has an instruction that the interpreter does not.
        OutOfBounds: an access outside of the arrays.
        ErnieQuantError: arguments do not fit the kernel's parameters.
    """
    program, code = _prepared(ptx)
    given = list(arguments.items())
    missing = len(program.parameters) - len(given)
    if not 0 <= missing <= 2:  # Triton adds two pointers to scratch memory
        raise ErnieQuantError(
            f"{program.name} takes {len(program.parameters)} parameters, got {len(given)}"
        )
    if programs is None:
        programs = [
            (x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])
        ]
    contents = [v if isinstance(v, np.ndarray) else None for _, v in given]
    memory = Memory.of(contents)
    parameters = {}
    for i, (name, _) in enumerate(program.parameters):
        value: Any = given[i][1] if i < len(given) else None
        is_pointer = value is None or isinstance(value, np.ndarray)
        parameters[name] = Memory.address(i) if is_pointer else value
    loop = main_loop(program, busiest)
    turns = {loop.last: most_turns - 1} if loop and most_turns else None
    at_once = max(1, LANES_AT_ONCE // program.threads)
    machines = []
    with np.errstate(all="ignore"):
        for first in range(0, len(programs), at_once):
            some = programs[first : first + at_once]
            shared = SharedMemory.of(len(some), shared_bytes, program.threads)
            machine = Machine(
                program, some, grid, memory, shared, parameters,
                record=record, compute=compute, late=late,
            )  # fmt: skip
            run(machine, code, turns=turns)
            machine.registers.clear()
            machines.append(machine)
    arrays = {
        name: memory.contents(i, value)
        for i, (name, value) in enumerate(given)
        if isinstance(value, np.ndarray)
    }
    return Launched(program, loop, tuple(machines), arrays)
