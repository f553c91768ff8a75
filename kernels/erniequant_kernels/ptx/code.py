"""From instructions to functions that execute them."""

import re
from collections.abc import Callable

import numpy as np

from erniequant_kernels.ptx.floats import conversion, float_function
from erniequant_kernels.ptx.integers import compare, integer_function
from erniequant_kernels.ptx.machine import (
    Execute,
    Machine,
    Mask,
    UnknownInstruction,
    reader,
)  # fmt: skip
from erniequant_kernels.ptx.matrix import warp_instruction
from erniequant_kernels.ptx.parse import Instruction, Program
from erniequant_kernels.ptx.transfers import transfer, vector
from erniequant_kernels.ptx.values import UNSIGNED, Array, bits_of
from erniequant_kernels.ptx.warpgroup import warpgroup_instruction

# Lanes advance together, so what orders memory has nothing to do. Programs of a grid that starts
# early (programmatic dependent launch) find the memory as it will be.
_NOTHING = (
    "bar.sync", "bar.warp.sync", "barrier.sync", "barrier.cta", "membar", "fence", "griddepcontrol",
    "wgmma.fence", "wgmma.commit", "wgmma.wait",
    "ret", "exit", "bra",
)  # fmt: skip


def _nothing(machine: Machine, mask: Mask) -> None:
    return None


def _move(program: Program, instruction: Instruction) -> Execute:
    """``mov``; a vector on one side cuts a register into parts or joins them."""
    bits = bits_of(instruction.opcode.rpartition(".")[2])
    target, source = instruction.operands
    if target.startswith("{"):
        parts, read = vector(target), reader(program, source, bits)
        each = bits // len(parts)

        def cut(machine: Machine, mask: Mask) -> None:
            value = read(machine)
            for i, part in enumerate(parts):
                piece = (value >> value.dtype.type(i * each)).astype(UNSIGNED[each])
                machine.write(part, piece, mask)

        return cut
    if source.startswith("{"):
        reads = [reader(program, s, bits // len(vector(source))) for s in vector(source)]
        each = bits // len(reads)

        def joined(machine: Machine, mask: Mask) -> None:
            total: Array = UNSIGNED[bits](0)
            for i, read_part in enumerate(reads):
                part = read_part(machine).astype(UNSIGNED[bits])
                total = total | (part << UNSIGNED[bits](i * each))
            machine.write(target, total, mask)

        return joined
    whole = reader(program, source, bits)
    return lambda machine, mask: machine.write(target, whole(machine), mask)


def _apply(
    program: Program, instruction: Instruction, function: Callable[..., Array], bits: list[int]
) -> Execute:
    target, *sources = instruction.operands
    reads = [reader(program, s, b) for s, b in zip(sources, bits, strict=True)]

    def execute(machine: Machine, mask: Mask) -> None:
        machine.write(target, function(*(read(machine) for read in reads)), mask)

    return execute


def _comparison(program: Program, instruction: Instruction) -> Execute:
    """``setp``, also joined with another predicate."""
    parts = instruction.opcode.split(".")
    kind = parts[-1]
    function = compare(parts[1], kind)
    if len(parts) > 3 and parts[2] in {"and", "or", "xor"}:
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[2]]
        bits = [bits_of(kind)] * 2 + [1]
        return _apply(program, instruction, lambda a, b, c: join(function(a, b), c), bits)
    if "|" in instruction.operands[0]:
        raise UnknownInstruction(instruction.opcode)
    return _apply(program, instruction, function, [bits_of(kind)] * 2)


def _function(program: Program, instruction: Instruction) -> Execute | None:
    parts = instruction.opcode.split(".")
    name, kind = parts[0], parts[-1]
    if name == "setp":
        return _comparison(program, instruction)
    if name == "mov" and not kind.startswith("v"):
        return _move(program, instruction)
    if name == "cvt":
        function = conversion(parts)
        if function is None:
            return None
        count = len(instruction.operands) - 1
        return _apply(program, instruction, function, [bits_of(kind)] * count)
    if not re.fullmatch(r"(pred|[bsuf]\d+|(bf16|[su]16)(x2)?)", kind):
        return None
    bits, count = bits_of(kind), len(instruction.operands) - 1
    if name == "selp":
        return _apply(program, instruction, lambda a, b, p: np.where(p, a, b), [bits, bits, 1])
    # Matching numpy types: shift counts and byte selectors are 32 bits wide.
    widths = [bits] * count
    if name in {"shl", "shr", "bfe"}:
        widths[1:] = [32] * (count - 1)
    elif name in {"shf", "bfi", "prmt", "lop3"}:
        widths = [32] * count
    elif name == "mad" and "wide" in parts:
        widths[2] = 2 * bits
    function = integer_function(parts) or float_function([p for p in parts if p != "ftz"])
    return None if function is None else _apply(program, instruction, function, widths)


def translate(program: Program) -> list[Execute]:
    """One function for each instruction.

    Raises:
        UnknownInstruction: names the first instruction that the interpreter does not have.
    """
    code = []
    for place, instruction in enumerate(program.instructions):
        try:
            execute: Execute | None
            if instruction.opcode.startswith(_NOTHING):
                execute = _nothing
            else:
                execute = (
                    transfer(program, instruction, place)
                    or warp_instruction(program, instruction)
                    or warpgroup_instruction(program, instruction, place)
                    or _function(program, instruction)
                )
        except (UnknownInstruction, KeyError) as error:
            raise UnknownInstruction(f"unknown instruction: {instruction}: {error}") from error
        if execute is None:
            raise UnknownInstruction(f"unknown instruction: {instruction}")
        code.append(execute)
    return code
