"""Loads, stores, asynchronous copies, matrix loads and atomics of the interpreter."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from erniequant_kernels.ptx.machine import (
    WARP,
    Execute,
    Machine,
    Mask,
    Read,
    UnknownInstruction,
    reader,
)  # fmt: skip
from erniequant_kernels.ptx.parse import Instruction, Program, split_operands
from erniequant_kernels.ptx.values import UNSIGNED, Array, bits_of, dtype_of, view

_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def address(program: Program, text: str, space: str) -> Read:
    """Byte addresses of all lanes for an operand in brackets."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UnknownInstruction(f"address {text}")
    bits = 32 if space == "shared" and program.registers.get(match[1]) != "b64" else 64
    base = reader(program, match[1], bits)
    offset = UNSIGNED[bits](int(match[2] or "0", 0) % (1 << bits))

    def addresses(machine: Machine) -> Array:
        return np.broadcast_to(base(machine).astype(UNSIGNED[bits]) + offset, (machine.lanes,))

    return addresses


def vector(text: str) -> list[str]:
    """Registers of ``{a, b}``, or the only one."""
    return list(split_operands(text.strip()[1:-1])) if text.startswith("{") else [text]


def space_of(parts: list[str]) -> str:
    """``global`` or ``shared``."""
    for part in parts:
        if part.startswith("shared"):
            return "shared"
        if part == "global":
            return "global"
    raise UnknownInstruction("an address space other than global and shared")


def _load(program: Program, instruction: Instruction, place: int) -> Execute:
    parts = instruction.opcode.split(".")
    kind, space = parts[-1], space_of(parts)
    bytes_each = bits_of(kind) // 8
    targets = vector(instruction.operands[0])
    where = address(program, instruction.operands[1], space)
    # A word that the interpreter reads has at most 8 bytes.
    name = str(instruction)

    def execute(machine: Machine, mask: Mask) -> None:
        addresses = where(machine)
        lanes = machine.active(mask)
        machine.note(place, space, False, bytes_each * len(targets), addresses, mask)
        for i, target in enumerate(targets):
            at = addresses[lanes] + addresses.dtype.type(i * bytes_each)
            words = machine.load(space, at, lanes, bytes_each, name)
            value = np.zeros(machine.lanes, words.dtype)
            value[lanes] = words
            machine.write(target, view(value, kind), mask)

    return execute


def _store(program: Program, instruction: Instruction, place: int) -> Execute:
    parts = instruction.opcode.split(".")
    kind, space = parts[-1], space_of(parts)
    bits = bits_of(kind)
    where = address(program, instruction.operands[0], space)
    sources = [reader(program, s, bits) for s in vector(instruction.operands[1])]
    name = str(instruction)

    def execute(machine: Machine, mask: Mask) -> None:
        addresses = where(machine)
        lanes = machine.active(mask)
        machine.note(place, space, True, bits // 8 * len(sources), addresses, mask)
        for i, source in enumerate(sources):
            value = np.broadcast_to(source(machine), (machine.lanes,))[lanes]
            at = addresses[lanes] + addresses.dtype.type(i * (bits // 8))
            machine.store(space, at, lanes, bits // 8, value.astype(UNSIGNED[bits]), name)

    return execute


def _copy(program: Program, instruction: Instruction, place: int) -> Execute:
    """``cp.async``: what lies beyond the stated number of source bytes becomes zero."""
    operands = instruction.operands
    to, source = address(program, operands[0], "shared"), address(program, operands[1], "global")
    size = int(operands[2], 0)
    stated = reader(program, operands[3], 32) if len(operands) > 3 else None
    width = min(size, 8)
    name = str(instruction)

    def execute(machine: Machine, mask: Mask) -> None:
        into, out_of = to(machine), source(machine)
        lanes = machine.active(mask)
        wanted = np.broadcast_to(stated(machine) if stated else np.uint32(size), (machine.lanes,))
        reading = (wanted > 0) if mask is None else (wanted > 0) & mask
        machine.note(place, "global", False, size, out_of, reading)
        machine.note(place, "shared", True, size, into, mask)
        from_lanes = np.flatnonzero(reading)
        for offset in range(0, size, width):
            value = np.zeros(machine.lanes, UNSIGNED[8 * width])
            if from_lanes.size:
                at = out_of[from_lanes] + np.uint64(offset)
                value[from_lanes] = machine.load("global", at, from_lanes, width, name)
            target = into[lanes] + into.dtype.type(offset)

            def write(target: Array = target, value: Array = value[lanes]) -> None:
                machine.store("shared", target, lanes, width, value, name)

            if machine.late:
                machine.copies[-1].append(write)
            else:
                write()

    return execute


def _commit(machine: Machine, mask: Mask) -> None:
    machine.copies.append([])


def _wait(instruction: Instruction) -> Execute:
    everything = instruction.opcode.endswith("wait_all")
    count = 0 if everything else int(instruction.operands[0])

    def execute(machine: Machine, mask: Mask) -> None:
        if everything:
            _commit(machine, mask)
        machine.arrive(count)

    return execute


def _matrices(program: Program, instruction: Instruction, place: int) -> Execute:
    """``ldmatrix`` and ``stmatrix`` of 8 by 8 matrices of 16-bit numbers.

    Lane ``8 * i + r`` gives the address of row ``r`` of matrix ``i``; lane ``l`` holds elements
    ``2 * (l % 4)`` and the next of row ``l // 4``, or of that column.
    """
    parts = instruction.opcode.split(".")
    count = int(next(p for p in parts if re.fullmatch(r"x[124]", p))[1:])
    transposed = "trans" in parts
    if parts[-1] != "b16" or "m8n8" not in parts:
        raise UnknownInstruction(instruction.opcode)
    load = parts[0] == "ldmatrix"
    registers = vector(instruction.operands[0 if load else 1])
    where = address(program, instruction.operands[1 if load else 0], "shared")
    sources = [] if load else [reader(program, r, 32) for r in registers]
    name = str(instruction)
    lane = np.arange(WARP)
    row, pair = lane // 4, lane % 4

    def halves(addresses: Array, matrix: int) -> tuple[Array, Array]:
        """Addresses of the two 16-bit elements of each lane, ``[warps, 32]``."""
        starts = addresses.reshape(-1, WARP)[:, 8 * matrix : 8 * matrix + 8]
        step = addresses.dtype.type
        if transposed:
            offset = (2 * row).astype(addresses.dtype)
            return starts[:, 2 * pair] + offset, starts[:, 2 * pair + 1] + offset
        first = starts[:, row] + (4 * pair).astype(addresses.dtype)
        return first, first + step(2)

    def execute(machine: Machine, mask: Mask) -> None:
        addresses = where(machine)
        used = np.arange(machine.lanes) % WARP < 8 * count
        machine.note(place, "shared", not load, 16, addresses, used if count < 4 else None)
        lanes = machine.every_lane
        for i, register in enumerate(registers):
            low, high = (a.reshape(-1) for a in halves(addresses, i))
            if load:
                one = machine.load("shared", low, lanes, 2, name).astype(np.uint32)
                two = machine.load("shared", high, lanes, 2, name).astype(np.uint32)
                machine.write(register, one | (two << np.uint32(16)), mask)
            else:
                value = sources[i](machine)
                machine.store("shared", low, lanes, 2, value.astype(np.uint16), name)
                upper = (value >> np.uint32(16)).astype(np.uint16)
                machine.store("shared", high, lanes, 2, upper, name)

    return execute


_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "min": min, "max": max, "and": lambda a, b: a & b,
    "or": lambda a, b: a | b, "exch": lambda a, b: b,
}  # fmt: skip


def _atomic(program: Program, instruction: Instruction, place: int) -> Execute:
    """``atom`` and ``red``, lane after lane."""
    parts = instruction.opcode.split(".")
    kind, space = parts[-1], space_of(parts)
    function = next((_ATOMIC[p] for p in parts if p in _ATOMIC), None)
    if function is None or bits_of(kind) not in (32, 64):
        raise UnknownInstruction(instruction.opcode)
    operands = instruction.operands if parts[0] == "atom" else ("_", *instruction.operands)
    bits = bits_of(kind)
    where = address(program, operands[1], space)
    source = reader(program, operands[2], bits)
    name = str(instruction)

    def execute(machine: Machine, mask: Mask) -> None:
        addresses = where(machine)
        lanes = machine.active(mask)
        machine.note(place, space, True, bits // 8, addresses, mask)
        given = np.broadcast_to(source(machine), (machine.lanes,))
        before = np.zeros(machine.lanes, UNSIGNED[bits])
        for lane in lanes:
            one = np.array([lane])
            old = machine.load(space, addresses[one], one, bits // 8, name)
            before[lane] = old[0]
            new = function(
                old.view(dtype_of(kind))[0], given[lane : lane + 1].view(dtype_of(kind))[0]
            )
            changed = np.array([new], dtype_of(kind)).view(UNSIGNED[bits])
            machine.store(space, addresses[one], one, bits // 8, changed, name)
        machine.write(operands[0], before, mask)

    return execute


def transfer(program: Program, instruction: Instruction, place: int) -> Execute | None:
    """The function of a memory instruction, or None if it is not one."""
    opcode = instruction.opcode
    if opcode.startswith("ld.param"):
        name = instruction.operands[1].strip("[] ").partition("+")[0].strip()
        target, bits = instruction.operands[0], bits_of(opcode.rpartition(".")[2])
        return lambda machine, mask: machine.write(
            target, UNSIGNED[bits](machine.parameters[name] % (1 << bits)), mask
        )
    if opcode.startswith("ld."):
        return _load(program, instruction, place)
    if opcode.startswith("st."):
        return _store(program, instruction, place)
    if opcode.startswith("cp.async.commit_group"):
        return _commit
    if opcode.startswith("cp.async.wait"):
        return _wait(instruction)
    if opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
        return _copy(program, instruction, place)
    if opcode.startswith(("ldmatrix", "stmatrix")):
        return _matrices(program, instruction, place)
    if opcode.startswith(("atom.", "red.")):
        return _atomic(program, instruction, place)
    return None
