"""Read the PTX that Triton emits: a kernel's parameters, registers, labels and instructions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from erniequant.errors import ErnieQuantError

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{(.*)(?:\$L__func_end|\n\})", re.S)
_PARAMETER = re.compile(r"\.param\s+\.([a-z]\d+)\s+(?:\.[^,]*?)?([\w$]+)\s*(?:,|$)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([^;]+)")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LABEL = re.compile(r"^\s*([\w$]+):")
_GUARD = re.compile(r"^@(!?)(%\w+)\s+")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers, such as ``ld.global.v4.b32``.
        operands: as written; an address keeps its brackets and a vector its braces.
        guard: predicate register, or empty.
        guard_negated: runs where the predicate is false.
        place: source file and line of the kernel, such as ``packed_gemm.py:110``, or empty.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str
    guard_negated: bool
    place: str

    def __str__(self) -> str:
        guard = f"@{'!' if self.guard_negated else ''}{self.guard} " if self.guard else ""
        place = f" ({self.place})" if self.place else ""
        operands = ", ".join(self.operands)
        return f"{guard}{self.opcode} {operands[:100]}{place}"


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        parameters: name of each parameter and its type (``u64`` for a pointer), in order; Triton
            adds two pointers to scratch memory behind the kernel's own.
        registers: type by name, ``b16``, ``b32``, ``b64`` or ``pred``.
        labels: index into ``instructions`` by name.
        threads: of a program, all warps together.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    registers: Mapping[str, str]
    labels: Mapping[str, int]
    instructions: tuple[Instruction, ...]
    threads: int


def split_operands(text: str) -> tuple[str, ...]:
    """Operands between commas that are outside of braces and brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return tuple(p for p in (*parts, part.strip()) if p)


def _declared(text: str) -> dict[str, str]:
    """Registers of all declarations, ``%r<3>`` as ``%r0`` to ``%r2``."""
    found = {}
    for kind, names in _REGISTERS.findall(text):
        for name in names.split(","):
            name = name.strip()
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                found[one] = kind
    return found


def parse(text: str) -> Program:
    """The only kernel of a module.

    Raises:
        ErnieQuantError: there is no kernel, or its size is not stated.
    """
    files = dict(_FILE.findall(text))
    text = re.sub(r"//[^\n]*", "", text)
    # LLVM marks the end; braces of inline assembly may stand at the beginning of a line, too.
    code, mark, _ = text.partition("$L__func_end")
    text = code + mark
    entry = _ENTRY.search(text)
    if entry is None:
        raise ErnieQuantError("no kernel in this PTX")
    name, parameters, properties, body = entry.groups()
    threads = _THREADS.search(properties)
    if threads is None:
        raise ErnieQuantError(f"{name}: the PTX does not state the threads of a program")
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    place, pending = "", ""
    for line in body.split("\n"):
        location = _LOCATION.search(line)
        if location:
            file = files.get(location[1], "").rpartition("/")[2]
            place = f"{file}:{location[2]}"
            continue
        label = _LABEL.match(line)
        if label and not pending.strip(" {}\t"):
            labels[label[1]] = len(instructions)
            line = line[label.end() :]
        pending += line + " "
        *statements, pending = pending.split(";")
        for statement in statements:
            # Braces around inline assembly open a scope; those of a vector follow an opcode.
            statement = statement.lstrip("{} \t").rstrip()
            if not statement or statement.startswith("."):
                continue
            guard = _GUARD.match(statement)
            if guard:
                statement = statement[guard.end() :]
            opcode, *operands = statement.split(None, 1)
            instructions.append(
                Instruction(
                    opcode,
                    split_operands(operands[0] if operands else ""),
                    guard[2] if guard else "",
                    bool(guard and guard[1]),
                    place,
                )
            )
    return Program(
        name,
        tuple((n, t) for t, n in _PARAMETER.findall(parameters.replace("\n", " "))),
        _declared(body),
        labels,
        tuple(instructions),
        int(threads[1]),
    )
