"""The cost of every kernel in machine code, as the shipped tuning tables run it on 21B shapes.

Small-batch decoding on fast-memory cards is bound by instruction issue, so instructions per decoded
weight are the cost to watch. `check` compares them with the recorded budget (budget.json).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import triton

from erniequant.codes import EFFORTS, REGISTERED, get_code, register_length
from erniequant.codes.spec import ConvolutionalCode
from erniequant.errors import ErnieQuantError
from erniequant_kernels import decode
from erniequant_kernels.combine import BLOCK_N, combine_kernel
from erniequant_kernels.dense_gemm import DenseGemmConfig, dense_gemm_kernel
from erniequant_kernels.expand import BLOCK_K, GROUPS_PER_PROGRAM, WARPS, expand_kernel
from erniequant_kernels.machine_code import ARCHITECTURES, KernelCost, compile_kernel, measure
from erniequant_kernels.packed_gemm import groups_per_warp, packed_gemm_kernel
from erniequant_kernels.prepare import prepare_kernel
from erniequant_kernels.rotation import rotation_constants, swiglu_rotate_kernel
from erniequant_kernels.routing import row_tiles_constants
from erniequant_kernels.tuning import PackedTile, TuningRow, tables

# ERNIE-4.5-21B-A3B: the shape that every figure on paper refers to.
HIDDEN, INNER, EXPERTS, TOP_K = 2560, 1536, 64, 6
TILE, ROTATION_BLOCK = 256, 128
DEFAULT_TOLERANCE = 0.02


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    Attributes:
        label: unique among the cases, such as ``packed_gemm cc2 L12 M16``.
        arguments: types of run-time arguments by name, such as ``*bf16``.
        constants: constexpr arguments by name.
        weights: distinct weights that a program decodes in a turn of its main loop (in all, if it
            has none).
    """

    label: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    weights: int = 0

    def compile(self, arch: int) -> KernelCost:
        """Compile and count for ``sm_<arch>``."""
        compiled = compile_kernel(
            self.kernel, self.arguments, self.constants, arch,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip
        return measure(compiled, arch, weights_per_iteration=self.weights, num_warps=self.warps)


_TILES = {f"{name}_ptr": "*i32" for name in ("order", "tile_expert", "tile_first", "tile_end")}


def packed_case(code: ConvolutionalCode, row: TuningRow) -> Case:
    """Gate and up of a fused layer."""
    tile = row.tiles[code.bits]
    assert isinstance(tile, PackedTile)
    warps = tile.warps
    groups = warps * groups_per_warp(code)
    return Case(
        f"packed_gemm {code.name} L{code.register_length} M{row.block_m}",
        packed_gemm_kernel,
        {"x_ptr": "*bf16", "packed_ptr": "*i32", "constants_ptr": "*i32"}
        | _TILES
        | {"out_ptr": "*fp32", "assignments": "i32"},
        {
            "TOP_K": TOP_K,
            "INPUTS": HIDDEN,
            "OUTPUTS": 2 * INNER,
            "TILE_WORDS": code.words_per_sequence(TILE),
            "BLOCK_M": row.block_m,
            "BLOCK_K": tile.block_k,
            "GROUPS": groups,
            "SPLITS": 2,
        }
        | decode.code_constants(code),
        warps,
        tile.stages,
        groups * tile.block_k * decode.group_weights(code),
    )


def _expand_case(code: ConvolutionalCode) -> Case:
    constants = {
        "INPUTS": HIDDEN, "OUTPUTS": 2 * INNER, "TILE_WORDS": code.words_per_sequence(TILE),
        "RUNS": GROUPS_PER_PROGRAM // decode.run_length(code.step_bits), "BLOCK_K": BLOCK_K,
    }  # fmt: skip
    return Case(
        f"expand {code.name} L{code.register_length}",
        expand_kernel,
        {"packed_ptr": "*i32", "constants_ptr": "*i32", "out_ptr": "*bf16"},
        constants | decode.code_constants(code),
        WARPS,
        3,
        GROUPS_PER_PROGRAM * BLOCK_K * decode.group_weights(code),
    )


_ROW_TILES = {
    "index_ptr": "*i64", "order_ptr": "*i32", "expert_ptr": "*i32", "first_ptr": "*i32",
    "end_ptr": "*i32", "starts_ptr": "*i32", "assignments": "i32", "tiles": "i32",
}  # fmt: skip


def _rotation_cases() -> Iterator[Case]:
    block = rotation_constants(ROTATION_BLOCK)
    rotation = {"x_ptr": "*bf16", "signs_ptr": "*i32", "out_ptr": "*bf16", "blocks": "i32"}
    tiles = row_tiles_constants(EXPERTS, 8)
    yield Case(
        "prepare", prepare_kernel, _ROW_TILES | rotation, tiles | {"INPUTS": HIDDEN} | block, 4, 3
    )
    pointers = {
        "partial_ptr": "*fp32", "scale_ptr": "*i16", "expert_index_ptr": "*i64",
        "signs_ptr": "*i32", "out_ptr": "*bf16", "rows": "i32", "splits": "i32",
    }  # fmt: skip
    yield Case(
        "swiglu_rotate", swiglu_rotate_kernel, pointers,
        {"EXPERTS": EXPERTS, "INNER": INNER} | block, 4, 3,
    )  # fmt: skip


def _other_cases(arch: int) -> Iterator[Case]:
    dense = DenseGemmConfig(64, 128, 64, 4, 3, 264)
    yield Case(
        f"dense_gemm M{dense.block_m} N{dense.block_n}",
        dense_gemm_kernel,
        {"x_ptr": "*bf16", "weights_ptr": "*bf16"}
        | _TILES
        | {"starts_ptr": "*i32", "out_ptr": "*bf16", "first_expert": "i32", "end_expert": "i32"},
        {
            "TOP_K": TOP_K, "INPUTS": HIDDEN, "OUTPUTS": 2 * INNER, "BLOCK_M": dense.block_m,
            "BLOCK_N": dense.block_n, "BLOCK_K": dense.block_k,
        },
        dense.warps,
        dense.stages,
    )  # fmt: skip
    yield Case(
        "combine",
        combine_kernel,
        {
            "partial_ptr": "*fp32", "scale_ptr": "*i16", "expert_index_ptr": "*i64",
            "routing_ptr": "*bf16", "out_ptr": "*bf16", "assignments": "i32",
            "splits": "i32",
        },
        {"EXPERTS": EXPERTS, "OUTPUTS": HIDDEN, "TOP_K": TOP_K, "BLOCK_N": BLOCK_N},
        4,
        3,
    )  # fmt: skip


def cases(arch: int) -> Iterator[Case]:
    """Every kernel, the decoding ones for each code and register length that an effort uses."""
    for code in (get_code(*key) for key in REGISTERED):
        if code.register_length not in {register_length(code.bits, e) for e in EFFORTS}:
            continue
        rows = [row for row in tables()[f"sm_{arch}"].rows if row.kernel == "packed"]
        # Two rows may differ in nothing but the load that they are for.
        yield from {row.block_m: packed_case(code, row) for row in rows}.values()
        yield _expand_case(code)
    yield from _rotation_cases()
    yield from _other_cases(arch)


def records(archs: Sequence[int] = ARCHITECTURES) -> Iterator[dict[str, Any]]:
    """Compile and count case by case.

    Raises:
        ErnieQuantError: Triton's interpreter is on, so nothing can be compiled.
    """
    if triton.knobs.runtime.interpret or not isinstance(packed_gemm_kernel, triton.JITFunction):
        raise ErnieQuantError("machine code needs Triton's compiler; unset TRITON_INTERPRET")
    for arch in archs:
        for case in cases(arch):
            cost = case.compile(arch)
            counted = {"issue_cost": cost.issue_cost, "per_weight": cost.per_weight}
            yield {"kernel": case.label, "triton": triton.__version__} | counted | asdict(cost)


def budget() -> dict[str, Any]:
    """Recorded costs: ``{"triton": version, "tolerance": t, "sm_90": {label: issue cost}}``."""
    text = resources.files("erniequant_kernels").joinpath("budget.json").read_text()
    return dict(json.loads(text))


def new_budget(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A budget from `records`."""
    result: dict[str, Any] = {"triton": triton.__version__, "tolerance": DEFAULT_TOLERANCE}
    for record in measured:
        if record["issue_cost"] is not None:
            costs = result.setdefault(f"sm_{record['arch']}", {})
            costs[record["kernel"]] = round(record["issue_cost"], 2)
    return result


def check(measured: Sequence[Mapping[str, Any]], allowed: Mapping[str, Any]) -> list[str]:
    """Problems, one line each: spills, no matrix instruction, more than the budget.

    Costs belong to one compiler: with another minor version of Triton only spills and matrix
    instructions are checked.
    """
    problems = []
    same_compiler = triton.__version__.split(".")[:2] == str(allowed["triton"]).split(".")[:2]
    for record in measured:
        name = f"sm_{record['arch']} {record['kernel']}"
        if record["spill_bytes"]:
            problems.append(f"{name}: {record['spill_bytes']} bytes of registers are spilled")
        if "gemm" in record["kernel"] and "MMA" not in record["matrix_opcode"]:
            problems.append(f"{name}: no matrix instruction in its main loop")
        if record["issue_cost"] is None or not same_compiler:
            continue
        limit = allowed.get(f"sm_{record['arch']}", {}).get(record["kernel"])
        if limit is None:
            problems.append(f"{name}: no budget recorded; add it to budget.json")
        elif record["issue_cost"] > limit + allowed["tolerance"]:
            problems.append(
                f"{name}: {record['issue_cost']:.2f} issue slots per weight, budget {limit:.2f}"
            )
    return problems
