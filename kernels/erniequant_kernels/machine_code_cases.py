"""Every kernel in the configurations that are counted: those of the tuning tables on 21B shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from erniequant.codes import EFFORTS, REGISTERED, get_code, register_length
from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels import decode
from erniequant_kernels.bench.problem import Shape, make_batch
from erniequant_kernels.combine import BLOCK_N, WARPS, combine_kernel
from erniequant_kernels.fused_gemm import FusedGemmConfig, fused_gemm_kernel
from erniequant_kernels.machine_code import FUSED_ADDITIONS, PRODUCTS, Busiest
from erniequant_kernels.packed_gemm import groups_per_warp, packed_gemm_kernel
from erniequant_kernels.prepare import prepare_kernel
from erniequant_kernels.rotation import ELEMENTS, rotation_constants, swiglu_rotate_kernel
from erniequant_kernels.routing import row_tiles_constants, row_tiles_reference
from erniequant_kernels.tuning import GemmConfig, tables
from erniequant_kernels.viterbi import forward_turns, search_constants, viterbi_kernel
from erniequant_kernels.wint2_gemm import TURN, wint2_gemm_kernel
from erniequant_kernels.wint2_tuning import Wint2Row, wint2_tables

# ERNIE-4.5-21B-A3B: the shape that every figure on paper refers to.
HIDDEN, INNER, EXPERTS, TOP_K = 2560, 1536, 64, 6
TILE, ROTATION_BLOCK = 256, 128
LONGEST_SEARCHED = 13
"""Of the registers whose search is counted: labels of longer ones do not fit a lane's registers."""


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    Attributes:
        label: unique among the cases, such as ``packed_gemm cc2 L12 M16 K32 W2``.
        arguments: types of run-time arguments by name, such as ``*bf16``.
        constants: constexpr arguments by name.
        weights: distinct weights that a program decodes in a turn of its main loop (in all, if it
            has none); of the Viterbi search, branches that it compares.
        turns: of the main loop that a program makes on the shape that the case stands for.
        values: what arguments hold where memory accesses are counted (`machine_traffic`): a number
            for each integer, numpy arrays for tables of indices. Other pointers read as zeros.
        program: the program of the grid whose accesses are counted.
        grid: of the launch, as the kernel may ask for it.
        fp_fusion: see `machine_code.compile_kernel`.
        registers: most that a lane may have; None leaves that to the compiler.
        busiest: instructions by which the main loop is found.
    """

    label: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    weights: int = 0
    turns: int = 1
    values: Mapping[str, Any] = field(default_factory=dict)
    program: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[int, int, int] = (1 << 16, 1 << 8, 1)
    fp_fusion: bool = True
    registers: int | None = None
    busiest: Busiest = PRODUCTS


@cache
def row_tile_values(block_m: int, experts: int = EXPERTS, top_k: int = TOP_K) -> dict[str, Any]:
    """Values of the arguments that describe row tiles: a random routing in which most are full."""
    tokens = 4 * block_m * experts // top_k
    index = make_batch(Shape(1, 1, experts, top_k), tokens, torch.device("cpu")).expert_index
    tiles = row_tiles_reference(index, experts, block_m)
    names = {
        "order": tiles.order, "tile_expert": tiles.expert, "tile_first": tiles.first,
        "tile_end": tiles.end,
    }  # fmt: skip
    values: dict[str, Any] = {f"{name}_ptr": tensor.numpy() for name, tensor in names.items()}
    return values | {"assignments": index.numel()}


def gemm_case(
    code: ConvolutionalCode, config: GemmConfig, outputs: int, inputs: int, top_k: int,
    experts: int = EXPERTS,
) -> Case:  # fmt: skip
    """A product on packed weights ``[experts, outputs, inputs]``."""
    name = f"{code.name} L{code.register_length} M{config.block_m}"
    fused = isinstance(config, FusedGemmConfig)
    arguments = {"x_ptr": "*bf16", "packed_ptr": "*i32"}
    arguments |= {"scale_ptr": "*i16"} if fused else {}
    arguments |= {"constants_ptr": "*i32"}
    tiles = ("order_ptr", "tile_expert_ptr", "tile_first_ptr", "tile_end_ptr")
    arguments |= dict.fromkeys(tiles, "*i32")
    constants = {
        "TOP_K": top_k, "INPUTS": inputs, "OUTPUTS": outputs,
        "TILE_WORDS": code.words_per_sequence(TILE), "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    } | decode.code_constants(code)  # fmt: skip
    values = row_tile_values(config.block_m, experts, top_k)
    if isinstance(config, FusedGemmConfig):
        return Case(
            f"fused_gemm {name} N{config.block_n} K{config.block_k} W{config.warps}",
            fused_gemm_kernel,
            arguments | {"out_ptr": "*bf16"},
            constants | {"BLOCK_N": config.block_n, "LAST": False},
            config.warps,
            config.stages,
            config.block_n * config.block_k,
            inputs // config.block_k,
            values,
        )
    groups = config.warps * groups_per_warp(code)
    return Case(
        f"packed_gemm {name} K{config.block_k} W{config.warps}",
        packed_gemm_kernel,
        arguments | {"out_ptr": "*fp32", "assignments": "i32"},
        constants | {"GROUPS": groups, "SPLITS": config.splits},
        config.warps,
        config.stages,
        groups * config.block_k * decode.group_weights(code),
        inputs // config.block_k // config.splits,
        values,
    )


def wint2_case(
    row: Wint2Row, outputs: int, inputs: int, top_k: int, experts: int = EXPERTS
) -> Case:
    """A product on packed WINT2 ``[experts, outputs, inputs]`` whose inputs are not split."""
    names = ("x", "code", "local", "code_scale", "code_zp", "constants", "order", "tile_expert",
             "tile_first", "tile_end", "out")  # fmt: skip
    types = {"x": "*bf16", "code_scale": "*fp32", "code_zp": "*fp32"}
    types["out"] = "*fp32" if row.partial_dtype == torch.float32 else "*bf16"
    return Case(
        f"wint2_gemm M{row.block_m} N{row.block_n} K{row.block_k} W{row.warps}",
        wint2_gemm_kernel,
        {f"{name}_ptr": types.get(name, "*i32") for name in names} | {"assignments": "i32"},
        {
            "TOP_K": top_k, "INPUTS": inputs, "OUTPUTS": outputs, "MMA64": True,
            "BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "BLOCK_K": row.block_k,
            "WARPS": row.warps, "WARP_GROUP": row.warp_group,
        },
        row.warps,
        row.stages,
        row.block_n * TURN,
        inputs // TURN,
        row_tile_values(row.block_m, experts, top_k),
        grid=(1 << 16, 1, 1),
        fp_fusion=False,
    )  # fmt: skip


_ROW_TILES = {
    "index_ptr": "*i64", "order_ptr": "*i32", "expert_ptr": "*i32", "first_ptr": "*i32",
    "end_ptr": "*i32", "starts_ptr": "*i32", "assignments": "i32", "tiles": "i32",
}  # fmt: skip


def rotate_cases(
    shape: Shape, tokens: int, splits: int, partial: str = "*fp32"
) -> tuple[Case, Case, Case]:
    """``prepare``, ``swiglu_rotate`` and ``combine`` of a layer.

    Args:
        partial: type of what the products write; fused ones write ``*bf16``, scaled.
    """
    written = {"ONE_SPLIT": splits == 1, "SCALED": partial == "*bf16"}
    block = rotation_constants(ROTATION_BLOCK)
    assignments = tokens * shape.top_k
    rotation = {"x_ptr": "*bf16", "signs_ptr": "*i32", "out_ptr": "*bf16", "blocks": "i32"}
    prepare = Case(
        "prepare", prepare_kernel, _ROW_TILES | rotation,
        row_tiles_constants(shape.experts, 8) | {"INPUTS": shape.hidden} | block, 4, 3,
        values={
            "assignments": assignments, "tiles": assignments,
            "blocks": tokens * shape.hidden // ROTATION_BLOCK,
        },
        # The first programs sort assignments; this one rotates.
        program=(shape.experts, 0, 0),
    )  # fmt: skip
    pointers = {
        "partial_ptr": partial, "scale_ptr": "*i16", "expert_index_ptr": "*i64",
        "signs_ptr": "*i32", "out_ptr": "*bf16", "rows": "i32", "splits": "i32",
    }  # fmt: skip
    swiglu = Case(
        "swiglu_rotate", swiglu_rotate_kernel, pointers,
        {"EXPERTS": shape.experts, "INNER": shape.inner} | written | block, 4, 3,
        values={"rows": assignments, "splits": splits},
    )  # fmt: skip
    combine = Case(
        "combine", combine_kernel,
        {
            "partial_ptr": partial, "scale_ptr": "*i16", "expert_index_ptr": "*i64",
            "routing_ptr": "*bf16", "out_ptr": "*bf16", "assignments": "i32", "splits": "i32",
        },
        {"EXPERTS": shape.experts, "OUTPUTS": shape.hidden, "TOP_K": shape.top_k,
         "BLOCK_N": BLOCK_N} | written, WARPS, 3,
        values={"assignments": assignments, "splits": splits},
    )  # fmt: skip
    return prepare, swiglu, combine


def rotate_programs(shape: Shape, tokens: int) -> tuple[int, int, int]:
    """Programs of `rotate_cases`."""
    rotated = -(-tokens * shape.hidden // ELEMENTS)
    swiglu = -(-tokens * shape.top_k * shape.inner // ELEMENTS)
    return shape.experts + rotated, swiglu, tokens * -(-shape.hidden // BLOCK_N)


def viterbi_case(code: ConvolutionalCode) -> Case:
    """The search for one row of tiles."""
    constants = search_constants(code, TILE)
    warps, registers = constants.pop("num_warps"), constants.pop("maxnreg")
    names = ("aims", "feedback", "scale", "root", "table", "error", "labels", "words", "target",
             "cost", "state")  # fmt: skip
    types = dict.fromkeys(("words", "state"), "*i32")
    return Case(
        f"viterbi {code.name} L{code.register_length} W{warps}",
        viterbi_kernel,
        {f"{name}_ptr": types.get(name, "*fp32") for name in names} | {"rows": "i32"},
        constants,
        warps,
        1,
        code.states,
        forward_turns(code, TILE),
        {"rows": 1},
        fp_fusion=False,
        registers=registers,
        busiest=FUSED_ADDITIONS,
    )


def cases(arch: int) -> Iterator[Case]:
    """Every kernel, those of codes for each register length that an effort uses."""
    tuning = tables()[f"sm_{arch}"]
    for code in (get_code(*key) for key in REGISTERED):
        if code.register_length not in {register_length(code.bits, e) for e in EFFORTS}:
            continue
        if code.register_length <= LONGEST_SEARCHED:
            yield viterbi_case(code)
        configs = (
            tuning.config(row, code, 2 * INNER, HIDDEN, EXPERTS, TOP_K)
            for row in range(len(tuning.rows))
        )
        found = (gemm_case(code, config, 2 * INNER, HIDDEN, TOP_K) for config in configs)
        # Rows may differ in nothing but the load that they are for, and in splits.
        yield from {case.label: case for case in found}.values()
    for row in wint2_tables()[f"sm_{arch}"].rows:
        yield wint2_case(row, 2 * INNER, HIDDEN, TOP_K)
    yield from rotate_cases(Shape(HIDDEN, INNER, EXPERTS, TOP_K), 64, 4)
