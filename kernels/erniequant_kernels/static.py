"""Count the machine code of a Triton kernel without a GPU.

Small-batch decoding on fast-memory cards is bound by instruction issue, so instructions per decoded
weight are the cost to watch. Triton compiles for sm_80 and sm_90 on any machine and ships the
disassembler; the innermost loop that holds matrix instructions is counted per execution pipe.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from erniequant.codes import CODE_NAMES, EFFORT_LENGTHS, ConvolutionalCode, get_code
from erniequant.errors import ErnieQuantError
from erniequant_kernels import decode
from erniequant_kernels.tile import decode_dot_tile

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

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")


@dataclass(frozen=True)
class LoopCost:
    """Instructions of the main loop of one kernel; counts are per lane and loop iteration."""

    arch: int
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

    @property
    def per_weight(self) -> dict[str, float]:
        """Instructions per decoded weight: all, and per pipe."""
        counts = {
            "all": self.instructions, "alu": self.alu, "multiply": self.multiply,
            "memory": self.memory, "matrix": self.matrix,
        }  # fmt: skip
        return {name: count / self.weights_per_lane for name, count in counts.items()}

    @property
    def issue_cost(self) -> float:
        """Issue slots of a lane per weight: the busiest of all issue and the half-rate pipes."""
        cost = self.per_weight
        return max(cost["all"], 2 * cost["alu"], 2 * cost["multiply"])


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
) -> Any:
    """Compile a ``@triton.jit`` function for ``sm_<arch>``; pointers are taken as 16-byte aligned.

    Args:
        signature: type of each runtime argument, in order (``"*bf16"``, ``"i32"``).
        constants: values of the constexpr arguments.
    """
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    aligned: dict[Any, Any] = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, t in signature.items()
        if t.startswith("*") or t == "i32"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
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


def _main_loop(listing: str) -> list[str]:
    """Opcodes of the innermost backward-branch range with the most matrix instructions."""
    code = [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(listing)]
    best: list[str] = []
    best_key = (0, 0)
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        if opcode.split(".")[0] != "BRA" or target is None or int(target[1], 16) >= address:
            continue
        body = [op for a, op, _ in code if int(target[1], 16) <= a <= address]
        key = (sum(op.split(".")[0] in _MATRIX for op in body), -len(body))
        if key > best_key:
            best, best_key = body, key
    if not best:
        raise ErnieQuantError(
            "no loop with matrix instructions in the machine code; it needs tl.dot in a loop"
        )
    return best


def measure(compiled: Any, arch: int, *, weights_per_iteration: int, num_warps: int) -> LoopCost:
    """Count the main loop of a compiled kernel.

    Args:
        weights_per_iteration: distinct weights that one CTA decodes per loop iteration.

    Raises:
        ErnieQuantError: the machine code has no loop with matrix instructions.
    """
    listing, usage = disassemble(compiled.asm["cubin"])
    body = [op for op in _main_loop(listing) if op != "NOP"]
    roots = Counter(op.split(".")[0] for op in body)

    def total(names: set[str]) -> int:
        return sum(roots[n] for n in names)

    multiply = total(_MULTIPLY) + (total(_PACKED_FLOAT) if arch < 90 else 0)
    matrix_names = Counter(op for op in body if op.split(".")[0] in _MATRIX)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"LOCAL:(\d+)", usage)
    frame = re.search(r"STACK:(\d+)", usage)
    spill = max(int(m[1]) if m else 0 for m in (stack, frame))
    return LoopCost(
        arch=arch,
        instructions=len(body),
        alu=total(_ALU),
        multiply=multiply,
        memory=total(_MEMORY),
        matrix=total(_MATRIX),
        matrix_opcode=matrix_names.most_common(1)[0][0],
        registers=int(registers[1]) if registers else 0,
        spill_bytes=spill,
        shared_bytes=compiled.metadata.shared,
        weights_per_lane=weights_per_iteration / (WARP * num_warps),
        opcodes=dict(Counter(".".join(op.split(".")[:2]) for op in body).most_common()),
    )


def measure_code(
    code: ConvolutionalCode, arch: int, *, rows: int = 32, tokens: int = 16
) -> LoopCost:
    """Count `decode_dot_tile` for a code: one warp, 16 groups, ``rows`` inputs an iteration."""
    groups = 16
    group_bits = decode.group_bits(code)
    constants = {
        "STEP_BITS": code.step_bits,
        "WEIGHTS_PER_STEP": code.weights_per_step,
        "LENGTH": code.register_length,
        "MULTIPLIER": code.multiplier,
        "GROUP_BITS": group_bits,
        "GROUPS": groups,
        "BLOCK_K": rows,
        "BLOCK_M": tokens,
    }
    signature = {
        "x_ptr": "*bf16",
        "packed_ptr": "*i32",
        "constants_ptr": "*i32",
        "out_ptr": "*fp32",
        "inputs": "i32",
    }
    compiled = compile_kernel(
        decode_dot_tile, signature, constants, arch, num_warps=1, num_stages=3
    )
    weights = groups * rows * group_bits // code.bits
    return measure(compiled, arch, weights_per_iteration=weights, num_warps=1)


def table(
    names: Sequence[str], lengths: Sequence[int], archs: Sequence[int]
) -> list[dict[str, Any]]:
    """One record per code, register length and architecture."""
    records = []
    for arch in archs:
        for name in names:
            for length in lengths:
                cost = measure_code(get_code(name, length), arch)
                records.append(
                    {"code": name, "register_length": length, "issue_cost": cost.issue_cost}
                    | {"per_weight": cost.per_weight}
                    | asdict(cost)
                )
    return records


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of `table` as aligned text."""
    head = (
        "arch",
        "code",
        "L",
        "cost",
        "all",
        "alu",
        "multiply",
        "memory",
        "matrix",
        "regs",
        "spill",
    )
    rows = [head]
    for r in records:
        counts = (f"{r['per_weight'][name]:.2f}" for name in head[4:9])
        first = (f"sm_{r['arch']}", r["code"], str(r["register_length"]), f"{r['issue_cost']:.2f}")
        rows.append((*first, *counts, str(r["registers"]), str(r["spill_bytes"])))
    lines = ["Issue slots of a lane per weight to decode and multiply, 16 tokens"]
    lines += ["  ".join(cell.rjust(8) for cell in row) for row in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the codes that a file may name."""
    parser = argparse.ArgumentParser(
        prog="python -m erniequant_kernels.static", description=main.__doc__
    )
    parser.add_argument("--code", nargs="+", choices=CODE_NAMES, default=list(CODE_NAMES))
    parser.add_argument("--register-length", nargs="+", type=int, default=list(EFFORT_LENGTHS))
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--json", metavar="FILE", help="also write the records")
    options = parser.parse_args(arguments)
    records = table(options.code, options.register_length, options.arch)
    print(render(records))
    if options.json:
        Path(options.json).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
