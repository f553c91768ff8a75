"""Tile sizes of the product on packed WINT2, read from wint2_tuning.json: one table per
architecture.

As in `erniequant_kernels.tuning`, a choice depends on sizes and architecture alone. Programs have
at most two warps on sm_100: from four on, Triton takes the instruction that reads weights from
tensor memory, and with the way there a weight costs 20 issue slots.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from erniequant_kernels.matrices import Wint2Matrices
from erniequant_kernels.routing import most_row_tiles
from erniequant_kernels.tuning import table_of
from erniequant_kernels.wint2_gemm import TURN, Wint2GemmConfig

TURNS_OF_A_SPLIT = 2
"""A program that takes fewer turns of the loop spends most of its time before and after it."""

FEW_TOKENS = 32
"""Row tiles up to this size may split the inputs, which takes sums in float32."""


@dataclass(frozen=True)
class Wint2Row:
    """Tile sizes up to some average number of assignments per expert, or any number (None); the
    others as in `Wint2GemmConfig`."""

    rows_per_expert: float | None
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    warp_group: bool = False

    @property
    def partial_dtype(self) -> torch.dtype:
        """Of the products: bfloat16 for many tokens, whose memory is the most that is written."""
        return torch.float32 if self.block_m <= FEW_TOKENS else torch.bfloat16


@dataclass(frozen=True)
class Wint2Tuning:
    """The table of one architecture.

    Attributes:
        warps_wanted: the inputs are split until this many warps have work.
        rows: the first that fits is taken; the last one fits any load.
    """

    warps_wanted: int
    rows: tuple[Wint2Row, ...]

    def row(self, rows_per_expert: float) -> Wint2Row:
        """The row for a load."""
        return next(
            row
            for row in self.rows
            if row.rows_per_expert is None or rows_per_expert <= row.rows_per_expert
        )

    def config(self, row: Wint2Row, matrix: Wint2Matrices, assignments: int) -> Wint2GemmConfig:
        """How to multiply ``assignments`` with a matrix."""
        splits = 1
        if row.block_m <= FEW_TOKENS:
            blocks = -(-matrix.outputs // row.block_n)
            warps = blocks * row.warps * most_row_tiles(assignments, matrix.experts, row.block_m)
            most = max(1, matrix.inputs // TURN // TURNS_OF_A_SPLIT)
            splits = min(most, -(-self.warps_wanted // warps))
        return Wint2GemmConfig(
            row.block_m, row.block_n, row.block_k, splits, row.warps, row.stages, row.warp_group
        )


def parse(settings: dict[str, Any]) -> Wint2Tuning:
    """One entry of wint2_tuning.json."""
    return Wint2Tuning(settings["warps_wanted"], tuple(Wint2Row(**row) for row in settings["rows"]))


@cache
def wint2_tables() -> dict[str, Wint2Tuning]:
    """Every table, by architecture (``sm_90``) or ``default``."""
    text = resources.files("erniequant_kernels").joinpath("wint2_tuning.json").read_text()
    return {name: parse(settings) for name, settings in json.loads(text).items()}


@cache
def wint2_tuning_for(device: torch.device) -> Wint2Tuning:
    """The table of a device, or the default one."""
    return table_of(device, wint2_tables())
