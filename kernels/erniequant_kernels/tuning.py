"""The choice of kernels and tile sizes, read from tuning.json: one table per architecture.

A choice depends on sizes and architecture alone, never on a measurement at run time, so the same
model gives the same numbers on every card of a kind.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from erniequant.codes.spec import ConvolutionalCode
from erniequant.errors import ErnieQuantError
from erniequant_kernels import decode
from erniequant_kernels.dense_gemm import DenseGemmConfig
from erniequant_kernels.packed_gemm import PackedGemmConfig, groups_per_warp
from erniequant_kernels.routing import most_row_tiles

DEFAULT = "default"
MAX_SPLITS = 16


@dataclass(frozen=True)
class PackedRow:
    """Tile sizes of the packed product up to some average number of assignments per expert.

    ``bits`` are the widths that it is for: at 2 and 3 bits a warp has twice the outputs, and 32
    tokens of them do not fit its registers.
    """

    rows_per_expert: float
    block_m: int
    block_k: int
    warps: int
    stages: int
    bits: tuple[int, ...] = (2, 3, 4)


def packed_warps(code: ConvolutionalCode, row: PackedRow) -> int:
    """Warps of a program. Runs of four groups must not be shared out over warps."""
    return row.warps if decode.run_length(code.step_bits) == 2 else 1


@dataclass(frozen=True, eq=False)  # part of the key of every layer's launches: hashed by identity
class Tuning:
    """The table of one architecture.

    Attributes:
        warps_wanted: the inputs are split until this many warps have work.
        packed: rows, of which the first that fits is taken; beyond them, experts are decoded once
            and multiplied by ``dense``.
        expanded_bytes: memory for decoded experts, two halves of at least one expert; enough of
            them that their product fills the card.
    """

    warps_wanted: int
    packed: tuple[PackedRow, ...]
    dense: DenseGemmConfig
    expanded_bytes: int

    def packed_row(self, rows_per_expert: float, bits: set[int]) -> PackedRow | None:
        """The row for a load and the widths of a layer, or None where decoding once is better."""
        fitting = (
            row
            for row in self.packed
            if rows_per_expert <= row.rows_per_expert and bits <= set(row.bits)
        )
        return next(fitting, None)

    def experts_at_once(self, outputs: int, inputs: int) -> int:
        """Experts of ``outputs`` by ``inputs`` that one half of the workspace holds decoded."""
        return max(1, self.expanded_bytes // (2 * torch.bfloat16.itemsize * outputs * inputs))

    def packed_config(
        self, row: PackedRow, code: ConvolutionalCode, outputs: int, inputs: int,
        assignments: int, experts: int,
    ) -> PackedGemmConfig:  # fmt: skip
        """Tile sizes for a matrix of ``outputs`` by ``inputs``.

        Raises:
            ErnieQuantError: the inputs are not a multiple of 16.
        """
        block_k = row.block_k
        while inputs % block_k:
            block_k //= 2
        if block_k < 16:
            raise ErnieQuantError(f"{inputs} inputs: the kernels need a multiple of 16")
        turns = inputs // block_k
        per_program = packed_warps(code, row)
        groups = outputs // decode.group_weights(code)
        blocks = -(-groups // (per_program * groups_per_warp(code)))
        warps = blocks * per_program * most_row_tiles(assignments, experts, row.block_m)
        divisors = [d for d in range(1, MAX_SPLITS + 1) if turns % d == 0]
        enough = (d for d in divisors if warps * d >= self.warps_wanted)
        splits = next(enough, divisors[-1])
        return PackedGemmConfig(row.block_m, block_k, splits, per_program, row.stages)


def parse(settings: dict[str, Any]) -> Tuning:
    """One entry of tuning.json."""
    rows = tuple(
        PackedRow(**{**row, "bits": tuple(row.get("bits", PackedRow.bits))})
        for row in settings["packed"]
    )
    dense = DenseGemmConfig(**settings["dense"])
    return Tuning(settings["warps_wanted"], rows, dense, settings["expanded_bytes"])


@cache
def tables() -> dict[str, Tuning]:
    """Every table, by architecture (``sm_90``) or ``default``."""
    text = resources.files("erniequant_kernels").joinpath("tuning.json").read_text()
    return {name: parse(settings) for name, settings in json.loads(text).items()}


@cache
def tuning_for(device: torch.device) -> Tuning:
    """The table of a device, or the default one."""
    if device.type != "cuda":
        return tables()[DEFAULT]
    major, minor = torch.cuda.get_device_capability(device)
    return tables().get(f"sm_{major}{minor}", tables()[DEFAULT])
