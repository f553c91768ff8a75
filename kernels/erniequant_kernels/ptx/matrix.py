"""Matrix instructions of a warp, and exchanges between its lanes."""

import re
from typing import Any

import numpy as np

from erniequant_kernels.ptx.machine import (
    WARP,
    Execute,
    Machine,
    Mask,
    UnknownInstruction,
    reader,
)  # fmt: skip
from erniequant_kernels.ptx.parse import Instruction, Program
from erniequant_kernels.ptx.transfers import vector
from erniequant_kernels.ptx.values import Array, dtype_of, from_bfloat16, view

_LANE = np.arange(WARP)
_ROW, _PAIR = _LANE // 4, _LANE % 4


def number_pairs(registers: Array, kind: str) -> tuple[Array, Array]:
    """Low and high halves of registers as float32."""
    if kind == "bf16":
        return from_bfloat16(registers), from_bfloat16(registers >> np.uint32(16))
    low, high = registers & np.uint32(0xFFFF), registers >> np.uint32(16)
    return view(low, "f16").astype(np.float32), view(high, "f16").astype(np.float32)


def _numbers(registers: list[Array], kind: str) -> tuple[Array, Array]:
    """Low and high halves of registers as float32, ``[registers, warps, 32]``."""
    return number_pairs(np.stack([r.reshape(-1, WARP) for r in registers]), kind)


def fragment_numbers(registers: list[Array], kind: str) -> Array:
    """The first operand ``[warps, 16, 16]`` that four registers of each lane hold."""
    low, high = _numbers(registers, kind)
    a = np.empty((low.shape[1], 16, 16), np.float32)
    for i, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        a[:, _ROW + row, 2 * _PAIR + column] = low[i]
        a[:, _ROW + row, 2 * _PAIR + 1 + column] = high[i]
    return a


def _multiply(program: Program, instruction: Instruction) -> Execute:
    """``mma.sync`` of 16 by 8 by 16 with float32 sums."""
    match = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32", instruction.opcode
    )
    if match is None:
        raise UnknownInstruction(instruction.opcode)
    kind = match[1]
    targets, *sources = (vector(o) for o in instruction.operands)
    first, second, third = ([reader(program, r, 32) for r in group] for group in sources)

    def execute(machine: Machine, mask: Mask) -> None:
        sums = [np.broadcast_to(read(machine), (machine.lanes,)) for read in third]
        if not machine.compute:
            for target, value in zip(targets, sums, strict=True):
                machine.write(target, value, mask)
            return
        a = fragment_numbers([r(machine) for r in first], kind)
        low, high = _numbers([r(machine) for r in second], kind)
        b = np.empty((low.shape[1], 16, 8), np.float32)
        for i in range(2):
            b[:, 2 * _PAIR + 8 * i, _ROW] = low[i]
            b[:, 2 * _PAIR + 1 + 8 * i, _ROW] = high[i]
        product = a @ b
        for i, (target, value) in enumerate(zip(targets, sums, strict=True)):
            part = product[:, _ROW + 8 * (i // 2), 2 * _PAIR + i % 2]
            machine.write(target, (part.reshape(-1) + value.view(np.float32)).view(np.uint32), mask)

    return execute


def _shuffle(program: Program, instruction: Instruction) -> Execute:
    """``shfl.sync``: the value of another lane of the same segment, or the own one."""
    how = instruction.opcode.split(".")[2]
    target, _, predicate = instruction.operands[0].partition("|")
    source, by, clamp = (reader(program, o, 32) for o in instruction.operands[1:4])

    def execute(machine: Machine, mask: Mask) -> None:
        value = np.broadcast_to(source(machine), (machine.lanes,)).reshape(-1, WARP)
        step = np.broadcast_to(by(machine), (machine.lanes,)).reshape(-1, WARP).astype(np.int64)
        bound = np.broadcast_to(clamp(machine), (machine.lanes,)).reshape(-1, WARP).astype(np.int64)
        segment = (bound >> 8) & 31
        last = (_LANE & segment) | (bound & 31 & ~segment)
        start = _LANE & segment
        other = {
            "up": _LANE - step, "down": _LANE + step, "bfly": _LANE ^ step,
            "idx": start | (step & ~segment & 31),
        }[how]  # fmt: skip
        inside = (other >= last) if how == "up" else (other <= last)
        other = np.where(inside, other, _LANE)
        machine.write(target, np.take_along_axis(value, other, axis=1).reshape(-1), mask)
        if predicate:
            machine.write(predicate, inside.reshape(-1), mask)

    return execute


def _votes(program: Program, instruction: Instruction) -> Execute:
    how = instruction.opcode.split(".")[2]
    target = instruction.operands[0]
    source = reader(program, instruction.operands[1], 1)

    def execute(machine: Machine, mask: Mask) -> None:
        votes = np.broadcast_to(source(machine), (machine.lanes,)).reshape(-1, WARP)
        here = np.ones_like(votes) if mask is None else mask.reshape(-1, WARP)
        result: Any = {
            "ballot": lambda: ((votes & here).astype(np.uint64) << _LANE.astype(np.uint64))
            .sum(axis=1).astype(np.uint32),
            "any": lambda: (votes & here).any(axis=1),
            "all": lambda: (votes | ~here).all(axis=1),
        }[how]()  # fmt: skip
        machine.write(target, np.repeat(result, WARP), mask)

    return execute


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _reduction(program: Program, instruction: Instruction) -> Execute:
    """``redux.sync`` over whole warps."""
    parts = instruction.opcode.split(".")
    function, kind = _REDUCTIONS[parts[2]], parts[-1]
    target, source = instruction.operands[0], reader(program, instruction.operands[1], 32)

    def execute(machine: Machine, mask: Mask) -> None:
        value = view(np.broadcast_to(source(machine), (machine.lanes,)).copy(), kind)
        result = function.reduce(value.reshape(-1, WARP), axis=1, dtype=dtype_of(kind))
        machine.write(target, np.repeat(result, WARP).view(np.uint32), mask)

    return execute


def warp_instruction(program: Program, instruction: Instruction) -> Execute | None:
    """The function of an instruction of a whole warp, or None if it is not one."""
    opcode = instruction.opcode
    for prefix, build in (
        ("mma.sync", _multiply), ("shfl.sync", _shuffle), ("vote.sync", _votes),
        ("redux.sync", _reduction),
    ):  # fmt: skip
        if opcode.startswith(prefix):
            return build(program, instruction)
    return None
