"""Matrix instructions of four warps (Hopper), which read operands from swizzled shared memory.

They run at once, where a card finishes them at the wait: early reads of what is not there yet show,
late ones of what was overwritten do not.
"""

import re
from dataclasses import dataclass

import numpy as np

from erniequant_kernels.ptx.machine import Execute, Machine, Mask, UnknownInstruction, reader
from erniequant_kernels.ptx.matrix import fragment_numbers, number_pairs
from erniequant_kernels.ptx.memory import Access
from erniequant_kernels.ptx.parse import Instruction, Program
from erniequant_kernels.ptx.transfers import vector
from erniequant_kernels.ptx.values import Array

THREADS = 128
ROWS, DEPTH = 64, 16
_OPCODE = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.(?:bf16|f16)"
)
_WIDTHS = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of a swizzled row by the mode of a descriptor


@dataclass(frozen=True)
class Descriptor:
    """Where a matrix lies in shared memory; all in bytes."""

    start: int
    leading: int
    stride: int
    width: int

    @classmethod
    def of(cls, bits: int) -> "Descriptor":
        """From its 64 bits (PTX manual, matrix descriptor format)."""
        start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        return cls(start, leading, stride, _WIDTHS[bits >> 62])

    def addresses(self, size: int, transposed: bool) -> Array:
        """Byte address of each element ``[size, 16]``, the second index being the summed one.

        ``transposed``: elements of the first index are neighbours in memory.
        """
        outer, k = np.arange(size)[:, None], np.arange(DEPTH)[None, :]
        if transposed:
            row = self.width // 2 or 8  # elements
            far, deep = (self.leading, self.stride) if self.width else (self.stride, self.leading)
            offset = outer % row * 2 + outer // row * far + k % 8 * 2 * row + k // 8 * deep
        elif self.width:
            offset = outer // 8 * self.stride + outer % 8 * self.width + k * 2
        else:
            offset = outer // 8 * self.stride + outer % 8 * 16 + k // 8 * self.leading + k % 8 * 2
        plain = self.start + offset
        # Sixteen-byte chunks of a row are permuted by the row's number in its block of eight.
        return plain ^ ((plain >> 7 & (self.width // 16 - 1 if self.width else 0)) << 4)


def _shared_matrix(
    machine: Machine, group: int, bits: int, size: int, transposed: bool, kind: str, name: str
) -> Array:
    """An operand ``[size, 16]`` of the warp group number ``group`` as float32."""
    addresses = Descriptor.of(bits).addresses(size, transposed).reshape(-1).astype(np.uint32)
    lanes = np.full(addresses.shape, group * THREADS)
    words = machine.load("shared", addresses, lanes, 2, name)
    low, _ = number_pairs(words.astype(np.uint32), kind)
    return low.reshape(size, DEPTH)


def _multiply(program: Program, instruction: Instruction, place: int) -> Execute:
    match = _OPCODE.fullmatch(instruction.opcode)
    if match is None:
        raise UnknownInstruction(instruction.opcode)
    columns, kind = int(match[1]), match[2]
    accumulators, first, second, keep, *rest = instruction.operands
    targets = vector(accumulators)
    sums = [reader(program, r, 32) for r in targets]
    from_registers = first.startswith("{")
    fragment = [reader(program, r, 32) for r in vector(first)] if from_registers else []
    a_bits = None if from_registers else reader(program, first, 64)
    b_bits, scale = reader(program, second, 64), reader(program, keep, 1)
    # Signs of both operands, then whether each in shared memory is transposed.
    signs = [int(r) for r in rest[:2]]
    transposed = [bool(int(r)) for r in rest[2:]]
    if signs != [1, 1]:
        raise UnknownInstruction(f"{instruction.opcode} with a negated operand")
    name = str(instruction)
    wavefronts = columns * DEPTH * 2 // 128 + (0 if from_registers else ROWS * DEPTH * 2 // 128)

    def execute(machine: Machine, mask: Mask) -> None:
        groups = machine.lanes // THREADS
        if machine.record:
            nothing = np.zeros(0, np.uint32)
            machine.accesses += [
                Access(place, "shared", False, 0, nothing, None, wavefronts)
            ] * groups
        if not machine.compute:
            for target, read in zip(targets, sums, strict=True):
                machine.write(target, read(machine), mask)
            return
        b_now = np.broadcast_to(b_bits(machine), (machine.lanes,))
        b = np.stack([
            _shared_matrix(machine, g, int(b_now[g * THREADS]), columns, transposed[-1], kind, name)
            for g in range(groups)
        ])  # fmt: skip
        if a_bits is None:
            a = fragment_numbers([r(machine) for r in fragment], kind)
            a = a.reshape(groups, ROWS, DEPTH)
        else:
            a_now = np.broadcast_to(a_bits(machine), (machine.lanes,))
            a = np.stack([
                _shared_matrix(machine, g, int(a_now[g * THREADS]), ROWS, transposed[0], kind, name)
                for g in range(groups)
            ])  # fmt: skip
        product = a @ b.swapaxes(1, 2)
        lane = np.arange(THREADS)
        row, pair = lane // 32 * 16 + lane % 32 // 4, lane % 4
        kept = np.broadcast_to(scale(machine), (machine.lanes,))
        for i, (target, read) in enumerate(zip(targets, sums, strict=True)):
            part = product[:, row + i // 2 % 2 * 8, i // 4 * 8 + 2 * pair + i % 2].reshape(-1)
            before = np.broadcast_to(read(machine), (machine.lanes,)).view(np.float32)
            total = part + np.where(kept, before, np.float32(0))
            machine.write(target, total.astype(np.float32).view(np.uint32), mask)

    return execute


def warpgroup_instruction(program: Program, instruction: Instruction, place: int) -> Execute | None:
    """The function of a matrix instruction of four warps, or None if it is not one."""
    if instruction.opcode.startswith("wgmma.mma_async"):
        return _multiply(program, instruction, place)
    return None
