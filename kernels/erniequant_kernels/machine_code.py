"""Count the machine code of a Triton kernel without a GPU.

Triton compiles for sm_80 and sm_90 on any machine and ships the disassembler; the innermost loop
that holds matrix instructions (of the Viterbi search, fused additions) is counted per execution
pipe, or the whole kernel if it has none.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from erniequant.errors import ErnieQuantError
from erniequant_kernels import dependent
from erniequant_kernels.ptx.launch import MATRIX

WARP = 32
ARCHITECTURES = (80, 90)

# Half-rate integer pipe (64 lanes per clock and SM): logic, shifts, permutes, adds, compares.
# fmt: off
_ALU = {
    "SHF", "LOP3", "PRMT", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "SGXT", "IMNMX", "VIMNMX",
    "IABS", "PLOP3", "BMSK", "LOP", "SHL", "SHR", "IADD", "FMNMX", "FSEL", "FSETP", "HMNMX2",
    "HSETP2", "P2R", "R2P", "VABSDIFF", "VOTE",
}
# Half-rate multiply pipe. Packed 16-bit arithmetic runs there on sm_80 and at full rate on sm_90.
_MULTIPLY = {"IMAD", "IDP"}
_PACKED_FLOAT = {"HFMA2", "HADD2", "HMUL2"}
_MEMORY = {
    "LDG", "LDS", "LDSM", "LDGSTS", "STS", "STG", "STSM", "LD", "ST", "LDL", "STL", "RED", "SHFL",
    "LDC",
}
# fmt: on
_MATRIX = {"HMMA", "HGMMA", "IMMA", "IGMMA"}


@dataclass(frozen=True)
class Busiest:
    """Instructions that a kernel spends its time on, by which its main loop is found.

    Attributes:
        ptx: how their opcodes begin in PTX.
        machine: their opcodes in machine code, without what follows a dot.
    """

    ptx: tuple[str, ...]
    machine: frozenset[str]


PRODUCTS = Busiest(MATRIX, frozenset(_MATRIX))
FUSED_ADDITIONS = Busiest(("fma.rn.f32",), frozenset({"FFMA"}))

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")


@dataclass(frozen=True)
class KernelCost:
    """Machine code of one kernel.

    Counts are per lane, of one turn of the main loop, or of the whole kernel where it has none
    (``looped`` is false).

    Attributes:
        once: issue slots of a warp for everything outside of the main loop, each instruction once;
            0 without a main loop.
        weights_per_lane: distinct weights decoded by a program in that code, over its lanes; 0 for
            a kernel that decodes none. Of the Viterbi search, branches.
    """

    arch: int
    looped: bool
    instructions: int
    alu: int
    multiply: int
    memory: int
    matrix: int
    matrix_opcode: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    weights_per_lane: float
    opcodes: Mapping[str, int]
    once: int = 0

    @property
    def per_weight(self) -> dict[str, float]:
        """Instructions per decoded weight: all, and per pipe; empty if none is decoded."""
        if not self.weights_per_lane:
            return {}
        counts = {
            "all": self.instructions, "alu": self.alu, "multiply": self.multiply,
            "memory": self.memory, "matrix": self.matrix,
        }  # fmt: skip
        return {name: count / self.weights_per_lane for name, count in counts.items()}

    @property
    def slots(self) -> int:
        """Issue slots of a warp: the busiest of all issue and the half-rate pipes."""
        return max(self.instructions, 2 * self.alu, 2 * self.multiply)

    @property
    def issue_cost(self) -> float | None:
        """Issue slots of a lane per weight."""
        return self.slots / self.weights_per_lane if self.weights_per_lane else None

    def cost_in_all(self, turns: int) -> float | None:
        """Issue slots of a lane per weight with what is outside of a main loop of ``turns``."""
        if not self.weights_per_lane:
            return None
        return (self.slots + self.once / turns) / self.weights_per_lane


def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise ErnieQuantError(
            f"{name} is missing from the installed Triton; install a wheel with the NVIDIA backend"
        )
    return str(path)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    *,
    num_warps: int,
    num_stages: int,
    fp_fusion: bool = True,
    registers: int | None = None,
) -> Any:
    """Compile a ``@triton.jit`` function for ``sm_<arch>``; pointers are taken as 16-byte aligned.

    Args:
        signature: type of each runtime argument, in order (``"*bf16"``, ``"i32"``).
        constants: values of the constexpr arguments.
        fp_fusion: whether ``a * b + c`` may be rounded once.
        registers: most that a lane may have.
    """
    if dependent.ARGUMENT in kernel.arg_names:
        constants = {**constants, dependent.ARGUMENT: arch >= dependent.LEAST_ARCH}
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    # Integers are not specialised (`do_not_specialize`), so nothing is known about them.
    aligned: dict[Any, Any] = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, t in signature.items()
        if t.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    if registers is not None:
        options["maxnreg"] = registers
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS listing and resource usage of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(option: str) -> str:
            command = [_tool("cuobjdump"), option, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        return dump("-sass"), dump("--dump-resource-usage")


def _main_loop(listing: str, busiest: frozenset[str]) -> tuple[list[str], list[str]]:
    """Opcodes of the backward-branch range, of those that hold no other, with the most of the
    busiest instructions, and all others; without such a range, all opcodes and none."""
    code = [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(listing)]
    backward = []
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        if opcode.split(".")[0] == "BRA" and target is not None and int(target[1], 16) < address:
            backward.append((int(target[1], 16), address))
    best: tuple[int, int] | None = None
    best_key = (0, 0)
    for first, last in backward:
        if any(first <= other and end < last for other, end in backward):
            continue
        body = [op for a, op, _ in code if first <= a <= last]
        key = (sum(op.split(".")[0] in busiest for op in body), -len(body))
        if key > best_key:
            best, best_key = (first, last), key
    if best is None:
        return [op for _, op, _ in code], []
    inside = [op for a, op, _ in code if best[0] <= a <= best[1]]
    return inside, [op for a, op, _ in code if not best[0] <= a <= best[1]]


class _Pipes:
    """Instructions of some code by pipe."""

    def __init__(self, opcodes: Iterable[str], arch: int):
        self.body = [op for op in opcodes if op != "NOP"]
        self._roots = Counter(op.split(".")[0] for op in self.body)
        self.all = len(self.body)
        self.alu = self.count(_ALU)
        self.multiply = self.count(_MULTIPLY) + (self.count(_PACKED_FLOAT) if arch < 90 else 0)

    def count(self, names: set[str]) -> int:
        return sum(self._roots[n] for n in names)

    @property
    def slots(self) -> int:
        return max(self.all, 2 * self.alu, 2 * self.multiply)


def measure(
    compiled: Any,
    arch: int,
    *,
    weights_per_iteration: int,
    num_warps: int,
    busiest: Busiest = PRODUCTS,
) -> KernelCost:
    """Count a compiled kernel.

    Args:
        weights_per_iteration: distinct weights that one program decodes in a turn of the main loop,
            or in all where there is none.
        busiest: instructions by which the main loop is found.
    """
    listing, usage = disassemble(compiled.asm["cubin"])
    inside, outside = _main_loop(listing, busiest.machine)
    loop = _Pipes(inside, arch)
    once = _Pipes(outside, arch)
    matrix_names = Counter(op for op in loop.body if op.split(".")[0] in _MATRIX)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"LOCAL:(\d+)", usage)
    frame = re.search(r"STACK:(\d+)", usage)
    spill = max(int(m[1]) if m else 0 for m in (stack, frame))
    return KernelCost(
        arch=arch,
        looped=bool(outside),
        instructions=loop.all,
        alu=loop.alu,
        multiply=loop.multiply,
        memory=loop.count(_MEMORY),
        matrix=loop.count(_MATRIX),
        matrix_opcode=matrix_names.most_common(1)[0][0] if matrix_names else "",
        registers=int(registers[1]) if registers else 0,
        spill_bytes=spill,
        shared_bytes=compiled.metadata.shared,
        weights_per_lane=weights_per_iteration / (WARP * num_warps),
        opcodes=dict(Counter(".".join(op.split(".")[:2]) for op in loop.body).most_common()),
        once=once.slots,
    )
