"""Execute a parsed kernel: all lanes of some programs at once, one instruction after the other.

Lanes that branch apart run in groups, those furthest behind first, so they meet again where the
structured code of a compiler rejoins. Warps advance together, which is one of the orders that a
card may choose; nothing here finds a race between warps. Asynchronous copies arrive as late as
waiting for them allows, or at once.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from erniequant.errors import ErnieQuantError
from erniequant_kernels.ptx.memory import Access, Memory, SharedMemory
from erniequant_kernels.ptx.parse import Instruction, Program
from erniequant_kernels.ptx.values import UNSIGNED, Array, bits_of, immediate

WARP = 32
Mask = Any  # bool over lanes, or None for all of them
Execute = Callable[["Machine", Mask], None]
Read = Callable[["Machine"], Array]


class UnknownInstruction(ErnieQuantError):
    """An instruction that the interpreter does not have."""


@dataclass
class Machine:
    """Registers and memory of programs under way.

    Attributes:
        programs: index in the grid of each program, ``(x, y, z)``.
        record: keep a list of memory accesses.
        compute: execute matrix instructions; otherwise sums stay what they are.
        late: asynchronous copies arrive when they are waited for, otherwise at once.
        taken: how often each backward branch was taken, by its index.
    """

    program: Program
    programs: Sequence[tuple[int, int, int]]
    grid: tuple[int, int, int]
    memory: Memory
    shared: SharedMemory
    parameters: Mapping[str, int]
    record: bool = True
    compute: bool = True
    late: bool = True
    registers: dict[str, Array] = field(default_factory=dict)
    taken: Counter[int] = field(default_factory=Counter)
    executed: Counter[int] = field(default_factory=Counter)
    accesses: list[Access] = field(default_factory=list)
    copies: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])

    def __post_init__(self) -> None:
        self.threads = self.program.threads
        self.lanes = len(self.programs) * self.threads
        self.every_lane = np.arange(self.lanes)
        thread = np.tile(np.arange(self.threads, dtype=np.uint32), len(self.programs))
        index = np.repeat(np.array(self.programs, np.uint32), self.threads, axis=0)
        zero = np.zeros_like(thread)
        self.special = {
            "%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%laneid": thread % np.uint32(WARP),
            "%ntid.x": zero + np.uint32(self.threads), "%ntid.y": zero + np.uint32(1),
            "%ntid.z": zero + np.uint32(1), "%warpid": thread // np.uint32(WARP),
        }  # fmt: skip
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = index[:, axis].copy()
            self.special[f"%nctaid.{name}"] = zero + np.uint32(self.grid[axis])

    def write(self, register: str, value: Array, mask: Mask) -> None:
        """Set a register where ``mask`` is true."""
        if register == "_":
            return
        kind = self.program.registers[register]
        dtype = np.bool_ if kind == "pred" else UNSIGNED[bits_of(kind)]
        value = np.asarray(value)
        if value.dtype != dtype:
            if value.dtype.kind == "i":  # extended by its sign
                value = value.astype(np.dtype(f"i{np.dtype(dtype).itemsize}"))
            elif value.dtype.kind == "f":
                value = value.view(UNSIGNED[8 * value.dtype.itemsize])
            value = (
                value.view(dtype)
                if value.dtype.kind == "i" and value.dtype.itemsize == np.dtype(dtype).itemsize
                else value.astype(dtype)
            )
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, (self.lanes,))
        if mask is not None:
            before = self.registers.get(register)
            value = np.where(mask, value, dtype(0) if before is None else before)
        self.registers[register] = value

    def active(self, mask: Mask) -> Array:
        """Indices of the lanes that take part."""
        return self.every_lane if mask is None else np.flatnonzero(mask)

    def note(
        self, place: int, space: str, store: bool, width: int, addresses: Array, mask: Mask
    ) -> None:
        """Keep an access for counting."""
        if self.record:
            self.accesses.append(Access(place, space, store, width, addresses, mask))

    def load(self, space: str, addresses: Array, lanes: Array, width: int, where: str) -> Array:
        """One word of at most eight bytes for each of some lanes."""
        memory = self.shared if space == "shared" else self.memory
        words, index = memory.words(addresses, lanes, width, where)
        return np.zeros(index.shape, UNSIGNED[8 * width]) if words is None else words[index]

    def store(
        self, space: str, addresses: Array, lanes: Array, width: int, value: Array, where: str
    ) -> None:
        """Write one word of each lane; of lanes that write to one place, the highest wins."""
        memory = self.shared if space == "shared" else self.memory
        words, index = memory.words(addresses, lanes, width, where)
        if words is not None:
            words[index] = value

    def arrive(self, but: int = 0) -> None:
        """Finish asynchronous copies except those of the last ``but`` committed groups."""
        finished = self.copies[: max(0, len(self.copies) - 1 - but)]
        self.copies = self.copies[len(finished) :]
        for group in finished:
            for copy in group:
                copy()


def reader(program: Program, text: str, bits: int) -> Read:
    """How to read an operand that is a register, a number or the start of shared memory.

    Raises:
        UnknownInstruction: it is something else.
    """
    if text in program.registers:
        kind = program.registers[text]
        nothing = np.bool_(False) if kind == "pred" else UNSIGNED[bits_of(kind)](0)

        def register(machine: Machine) -> Array:
            value = machine.registers.get(text)
            return np.broadcast_to(nothing, (machine.lanes,)) if value is None else value

        return register
    if text.startswith("%"):
        return lambda machine: machine.special[text]
    if text.startswith("!"):
        inner = reader(program, text[1:], bits)
        return lambda machine: ~inner(machine)
    if text.startswith("global_smem"):
        offset = np.uint64(int(text.partition("+")[2] or 0))
        return lambda machine: UNSIGNED[bits](offset)
    number = immediate(text, bits)
    if number is None:
        raise UnknownInstruction(f"operand {text}")
    return lambda machine: number


def guarded(program: Program, instruction: Instruction) -> Callable[[Machine, Mask], Mask]:
    """The lanes of a mask in which the guard of an instruction holds."""
    read = reader(program, instruction.guard, 1)

    def mask_of(machine: Machine, mask: Mask) -> Mask:
        holds = read(machine)
        holds = ~holds if instruction.guard_negated else holds
        both = holds if mask is None else holds & mask
        return None if both.all() else both

    return mask_of


def run(
    machine: Machine, code: Sequence[Execute], *, turns: Mapping[int, int] | None = None
) -> None:
    """Run all programs to their end.

    Args:
        code: one function per instruction of the program.
        turns: how often to take a backward branch at most, by its index.
    """
    program, limits = machine.program, turns or {}
    guards = [guarded(program, i) if i.guard else None for i in program.instructions]
    targets = {
        place: program.labels[i.operands[0]]
        for place, i in enumerate(program.instructions)
        if i.opcode.split(".")[0] == "bra"
    }
    end = len(program.instructions)
    waiting: dict[int, Mask] = {0: None}
    while waiting:
        place = min(waiting)
        mask = waiting.pop(place)
        nearest = min(waiting, default=end)
        while place < end:
            if place >= nearest:
                _join(waiting, place, mask)
                break
            instruction, guard = program.instructions[place], guards[place]
            opcode = instruction.opcode.partition(".")[0]
            machine.executed[place] += 1
            taken = mask if guard is None else guard(machine, mask)
            nobody = taken is not None and not taken.any()
            if opcode in {"ret", "exit"}:
                mask = _rest(mask, taken)
                if mask is None:
                    break
            elif opcode == "bra":
                target = targets[place]
                if target <= place and machine.taken[place] >= limits.get(place, 1 << 62):
                    nobody = True
                if not nobody:
                    machine.taken[place] += target <= place
                    rest = _rest(mask, taken)
                    if rest is not None:
                        _join(waiting, place + 1, rest)
                        nearest = min(waiting)
                    place, mask = target, taken
                    continue
            elif not nobody:
                code[place](machine, taken)
            place += 1


def _rest(mask: Mask, taken: Mask) -> Mask:
    """Lanes of ``mask`` that are not in ``taken``; None for none of them."""
    if taken is None:
        return None
    rest = ~taken if mask is None else mask & ~taken
    return rest if rest.any() else None


def _join(waiting: dict[int, Mask], place: int, mask: Mask) -> None:
    other = waiting.get(place)
    if place in waiting and mask is not None and other is not None:
        mask = mask | other
        mask = None if mask.all() else mask
    waiting[place] = mask
