"""Decode whole matrices on the CPU: labels in the order of outputs, times their scales, then the
rotation undone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from llvmlite import ir

from erniequant.codes.reference import decode as reference_decode
from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels.cpu import labels
from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.lanes import LanePlan
from erniequant_kernels.cpu.machine import Machine, machine
from erniequant_kernels.cpu.rotation import RotationSpec, rotation
from erniequant_kernels.cpu.threads import run_items
from erniequant_kernels.cpu.vector_code import (
    I64,
    POINTER,
    Code,
    by_lane_first,
    integer,
)

ITEM_INPUTS = 16
"""Inputs of one item: as many neighbouring numbers of a row of the result are a cache line."""


@dataclass(frozen=True)
class ExpandSpec:
    """One compiled decoder: code, tile and K inputs."""

    code: ConvolutionalCode
    tile: int
    inputs: int


def expand_reference(
    packed: torch.Tensor, scale: torch.Tensor, code: ConvolutionalCode, tile: int
) -> torch.Tensor:
    """Scaled labels in plain torch: packed int32 ``[N / tile, K * words]``, scale float32 ``[N]``,
    to float32 ``[N, K]``."""
    return reference_decode(packed, code, tile) * scale[:, None]


@cache
def expand(spec: ExpandSpec, machine: Machine) -> Callable[..., None]:
    """The compiled decoder.

    Its arguments are integers: address of the counter of items (int64, 0 at first), number of
    items, tiles; addresses of ``packed`` ``[tiles, K * words]`` and of the labels, float32 ``[K,
    N]``. Item ``i`` is tile ``i % tiles`` of the ``i // tiles``-th `ITEM_INPUTS` inputs.
    """
    return compile_function(expand_module(spec, machine), "expand", machine)


def expand_module(spec: ExpandSpec, machine: Machine) -> ir.Module:
    """The code of `expand`."""
    # One row at a time: rows of short sequences do not share vectors, since each is stored alone.
    groups = LanePlan(spec.code, spec.tile, 1, 1).groups
    plan = LanePlan(spec.code, spec.tile, min(machine.lanes, groups), 1)
    code = Code("expand", [POINTER, I64, I64, POINTER, POINTER])
    counter, items, tiles, packed, out = code.function.args

    def item(number: ir.Value) -> None:
        at = code.at
        tile, part = at.urem(number, tiles), at.udiv(number, tiles)
        first = at.mul(part, integer(ITEM_INPUTS))
        end = at.add(first, integer(ITEM_INPUTS))
        end = at.select(at.icmp_unsigned("<", end, integer(spec.inputs)), end, integer(spec.inputs))
        words = code.address(packed, at.mul(tile, integer(4 * plan.words * spec.inputs)))
        labels_of_tile = code.address(out, at.mul(tile, integer(4 * spec.tile)))
        row_bytes = at.mul(tiles, integer(4 * spec.tile))

        def row(k: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            source = code.address(words, code.at.mul(k, integer(4 * plan.words)))
            target = code.address(labels_of_tile, code.at.mul(k, row_bytes))
            for place, values in _row(code, plan, source):
                code.store(values, code.address(target, 4 * place))
            return []

        code.loop(first, end, 1, [], row)

    code.claim_items(counter, items, item)
    return code.module


def _row(code: Code, plan: LanePlan, words: ir.Value) -> list[tuple[int, ir.Value]]:
    """Labels of a row as float32 vectors, with the output that each begins with."""
    pairs = [(v, s) for v in range(plan.vectors) for s in range(plan.steps)]
    windows = labels.load_windows(code, plan, words, pairs)
    found = []
    for v in range(plan.vectors):
        weights: list[ir.Value] = []
        for s in range(plan.steps):
            halves = labels.float_halves(code, labels.masked_products(code, plan, windows, v, s))
            two = plan.code.weights_per_step == 2
            weights += halves if two else [code.at.fadd(*halves)]
        for i, values in enumerate(by_lane_first(code, weights)):
            found.append(((v * plan.group_weights + i) * plan.lanes, values))
    return found


def decode_weight_cpu(
    packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, code: ConvolutionalCode,
    tile: int, block: int, *, on: Machine | None = None,
) -> torch.Tensor:  # fmt: skip
    """`erniequant.packing.decoding.decode_weight` of one matrix, equal to the last bit.

    Args:
        packed: int32 ``[N / tile, K * words]``; scale: int16 ``[N, 1]``; signs: int32
            ``[ceil(K / 32)]``.
        block: channels that the rotation transforms together.
        on: the machine to make code for; this one unless given.

    Returns:
        float32 ``[N, K]``.
    """
    chosen = on or machine()
    tiles, inputs = packed.shape[0], packed.shape[1] // code.words_per_sequence(tile)
    packed, signs = packed.contiguous(), signs.contiguous()
    columns = torch.empty(inputs, tiles * tile)
    run_items(
        expand(ExpandSpec(code, tile, inputs), chosen), tiles * -(-inputs // ITEM_INPUTS), tiles,
        packed.data_ptr(), columns.data_ptr(), microseconds=columns.numel() / 1000,
    )  # fmt: skip
    rows = columns.T * scale.view(torch.bfloat16).float()
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    undo = rotation(RotationSpec(inputs, block, bfloat16=False, inverse=True), chosen)
    index = torch.arange(len(rows))
    undo(len(rows), *(tensor.data_ptr() for tensor in (index, rows, signs, out)))
    return out
