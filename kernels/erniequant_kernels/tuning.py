"""The choice of kernels and tile sizes, read from tuning.json: one table per architecture.

A choice depends on sizes and architecture alone, never on a measurement at run time, so the same
model gives the same numbers on every card of a kind.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from erniequant.codes import CODE_NAMES
from erniequant.codes.spec import ConvolutionalCode
from erniequant.errors import ErnieQuantError
from erniequant_kernels import decode
from erniequant_kernels.fused_gemm import FusedGemmConfig
from erniequant_kernels.packed_gemm import PackedGemmConfig, groups_per_warp

DEFAULT = "default"
MAX_SPLITS = 32
TABLE = "ERNIEQUANT_TUNING"
"""Environment variable: a file in the form of tuning.json whose tables replace the shipped ones."""

GemmConfig = PackedGemmConfig | FusedGemmConfig
Table = TypeVar("Table")


@dataclass(frozen=True)
class PackedTile:
    """What a row says about the packed product of one width; see `PackedGemmConfig`."""

    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class FusedTile:
    """What a row says about the fused product of one width; see `FusedGemmConfig`."""

    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TuningRow:
    """The product for loads up to some average number of assignments per expert.

    Attributes:
        rows_per_expert: that number; infinite in the last row.
        kernel: ``packed`` for few tokens, ``fused`` for many.
        block_m: tokens of a row tile, for both matrices of a layer.
        tiles: by bits per weight.
        warps_wanted: instead of the table's.
        named_tiles: by name, of codes that another tile suits better than that of their width.
    """

    rows_per_expert: float
    kernel: Literal["packed", "fused"]
    block_m: int
    tiles: Mapping[int, PackedTile | FusedTile]
    warps_wanted: int | None = None
    named_tiles: Mapping[str, PackedTile | FusedTile] = field(default_factory=dict)

    def tile(self, code: ConvolutionalCode) -> PackedTile | FusedTile:
        """The tile of a code."""
        return self.named_tiles.get(code.name) or self.tiles[code.bits]


@dataclass(frozen=True, eq=False)
class Tuning:
    """The table of one architecture; one equals itself alone.

    Attributes:
        warps_wanted: the inputs of packed products are split until this many warps have work.
        rows: by rising load; the first that fits is taken.
    """

    warps_wanted: int
    rows: tuple[TuningRow, ...]

    def row(self, rows_per_expert: float) -> int:
        """Index of the row for a load."""
        fits = (i for i, row in enumerate(self.rows) if rows_per_expert <= row.rows_per_expert)
        return next(fits, len(self.rows) - 1)

    def config(
        self, index: int, code: ConvolutionalCode, outputs: int, inputs: int, experts: int,
        top_k: int,
    ) -> GemmConfig:  # fmt: skip
        """Tile sizes for a matrix of ``outputs`` by ``inputs``: the same for all loads of a row, so
        that few variants of a kernel are compiled.

        Raises:
            ErnieQuantError: the inputs are not a multiple of 16.
        """
        row = self.rows[index]
        tile = row.tile(code)
        block_k = tile.block_k
        while inputs % block_k:
            block_k //= 2
        if block_k < 16:
            raise ErnieQuantError(f"{inputs} inputs: the kernels need a multiple of 16")
        if isinstance(tile, FusedTile):
            return FusedGemmConfig(row.block_m, tile.block_n, block_k, tile.warps, tile.stages)
        # At its least load the row has so many row tiles, all experts but the unlucky being hit.
        least = self.rows[index - 1].rows_per_expert if index else 0.0
        row_tiles = max(top_k, min(experts, int(least * experts)))
        groups = outputs // decode.group_weights(code)
        warps = -(-groups // groups_per_warp(code)) * row_tiles
        turns = inputs // block_k
        divisors = [d for d in range(1, MAX_SPLITS + 1) if turns % d == 0]
        enough = (d for d in divisors if warps * d >= (row.warps_wanted or self.warps_wanted))
        splits = next(enough, divisors[-1])
        return PackedGemmConfig(row.block_m, block_k, splits, tile.warps, tile.stages)


def parse(settings: Mapping[str, Any]) -> Tuning:
    """One entry of tuning.json.

    Raises:
        ErnieQuantError: it is no such entry.
    """
    try:
        rows = tuple(map(_row, settings["rows"]))
        tuning = Tuning(int(settings["warps_wanted"]), rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ErnieQuantError(f"a tuning table is damaged: {error!r}") from error
    loads = [row.rows_per_expert for row in rows]
    if not rows or loads != sorted(set(loads)) or loads[-1] != float("inf"):
        raise ErnieQuantError(
            "a tuning table needs rows by rising rows_per_expert, null in the last one"
        )
    return tuning


def _row(settings: Mapping[str, Any]) -> TuningRow:
    kind = {"packed": PackedTile, "fused": FusedTile}[settings["kernel"]]
    all_tiles = {key: kind(**tile) for key, tile in settings["tiles"].items()}
    named = {key: tile for key, tile in all_tiles.items() if key in CODE_NAMES}
    tiles = {int(key): tile for key, tile in all_tiles.items() if key not in named}
    missing = {2, 3, 4} - set(tiles)
    if missing:
        raise ValueError(f"no tile for {min(missing)} bits")
    load = settings["rows_per_expert"]
    most = float("inf") if load is None else float(load)
    wanted = settings.get("warps_wanted")
    return TuningRow(
        most, settings["kernel"], int(settings["block_m"]), tiles, wanted and int(wanted), named
    )


def settings_of(tuning: Tuning) -> dict[str, Any]:
    """Inverse of `parse`."""
    return {
        "warps_wanted": tuning.warps_wanted,
        "rows": [
            {
                "rows_per_expert": None
                if row.rows_per_expert == float("inf")
                else row.rows_per_expert,
                "kernel": row.kernel,
                "block_m": row.block_m,
                "tiles": {
                    str(key): vars(tile)
                    for key, tile in (*row.tiles.items(), *row.named_tiles.items())
                },
            }
            | ({"warps_wanted": row.warps_wanted} if row.warps_wanted else {})
            for row in tuning.rows
        ],
    }


@cache
def tables() -> dict[str, Tuning]:
    """Every table, by architecture (``sm_90``) or ``default``.

    Raises:
        ErnieQuantError: the file that `TABLE` names cannot be read.
    """
    text = resources.files("erniequant_kernels").joinpath("tuning.json").read_text()
    settings = json.loads(text)
    own = os.environ.get(TABLE)
    if own:
        try:
            settings |= json.loads(Path(own).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise ErnieQuantError(f"{TABLE}={own} is no tuning table: {error}") from error
    return {name: parse(entry) for name, entry in settings.items()}


def table_of(device: torch.device, of_architectures: Mapping[str, Table]) -> Table:
    """A device's entry of some tables by architecture, or the default one."""
    if device.type != "cuda":
        return of_architectures[DEFAULT]
    major, minor = torch.cuda.get_device_capability(device)
    return of_architectures.get(f"sm_{major}{minor}", of_architectures[DEFAULT])


@cache
def tuning_for(device: torch.device) -> Tuning:
    """The table of a device, or the default one."""
    return table_of(device, tables())
