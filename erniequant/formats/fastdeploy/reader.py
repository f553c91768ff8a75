"""Read a FastDeploy checkpoint as if it were the original: its names, shapes and orientation.

Matrices are decoded one at a time as they are asked for; those of rank folders are joined. Headers
are checked when it is opened, so a wrong file is named before anything is decoded.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from erniequant.checkpoint.config import read_config
from erniequant.checkpoint.reader import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    TensorHeader,
    open_checkpoint,
    read_header,
    read_sharded,
)
from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.formats.fastdeploy.config import (
    FastDeploySettings,
    choose_k_order,
    plain_config,
    read_settings,
)
from erniequant.formats.fastdeploy.convert import matrix_from_ranks, plain_from_ranks
from erniequant.formats.fastdeploy.names import Matrix, Part, Plain, parts_of
from erniequant.formats.fastdeploy.schema import check_keys, check_readable
from erniequant.formats.fastdeploy.sizes import FastDeployModel, fastdeploy_model, text_moe
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.paths import expanded

_RANK = re.compile(r"rank(0|[1-9][0-9]{0,2})")
Lines = tuple[str, ...]
Check = Callable[[Mapping[str, TensorHeader], FastDeployModel], Lines]

_COUNTS = ("num_hidden_layers", *Ernie45Moe.expert_count_keys)


class FastDeployCheckpoint:
    """A FastDeploy checkpoint under the original's names; a `TensorSource`.

    Attributes:
        folder: where it is.
        config: config.json that the original would have.
        model: its sizes and the coding of its experts.
        settings: see `FastDeploySettings`.
        ranks: the files of each rank.
        k_order: K order of its WINT2 codes; None if unknown, and then experts cannot be decoded.
    """

    def __init__(
        self,
        folder: Path,
        ranks: tuple[Checkpoint, ...],
        model: FastDeployModel,
        settings: FastDeploySettings,
        k_order: str | None,
    ):
        self.folder, self.ranks, self.model, self.settings = folder, ranks, model, settings
        self.config = plain_config(ranks[0].config, "bfloat16")
        self.k_order = k_order
        self.parts: dict[str, Part] = {}
        for part in parts_of(model):
            for name in (part.source,) if isinstance(part, Plain) else part.sources:
                self.parts[name] = part
        self._decoded: dict[str, torch.Tensor] = {}

    def files(self) -> set[str]:
        """Names in `folder` of what holds the weights: shards, or the folders of ranks."""
        if len(self.ranks) > 1:
            return {rank.folder.name for rank in self.ranks}
        return set(self.ranks[0].shards)

    def names(self) -> list[str]:
        """Names of the original's tensors."""
        return [name for name, part in self.parts.items() if self._present(part)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of the original's tensors. Raises ErnieQuantError as `tensor`."""
        part = self._part(name)
        if isinstance(part, Plain):
            return part.shape
        return part.outputs[part.sources.index(name)], part.inputs

    def is_decoded(self, name: str) -> bool:
        """True if a tensor is stored quantised. Raises ErnieQuantError as `tensor`."""
        return isinstance(self._part(name), Matrix)

    def tensor(self, name: str) -> torch.Tensor:
        """One of the original's tensors: decoded exactly, in float32, or as it is stored.

        Raises:
            ErnieQuantError: there is none of that name, ranks disagree, a file cannot be read, or
                nobody says in which order WINT2 has its inputs.
        """
        part = self._part(name)
        if isinstance(part, Plain):
            return plain_from_ranks(part, [rank.tensor(part.key) for rank in self.ranks])
        if name not in self._decoded:
            # Sources of one matrix are asked for one after the other.
            self._decoded = self.decode(part, self.k_order)
        return self._decoded[name].clone()

    def decode(self, part: Matrix, k_order: str | None) -> dict[str, torch.Tensor]:
        """The original's tensors of a matrix, float32 ``[n, K]``, by name.

        Raises:
            ErnieQuantError: as `tensor`.
        """
        if part.format == "wint2" and k_order is None:
            raise ErnieQuantError(
                f"{self.folder} does not say in which order its WINT2 codes have their inputs; "
                "give k_order (mma64 since July 2025, plain before) or the original to compare with"
            )
        ranks = [self.keys_of(part, rank) for rank in self.ranks]
        return matrix_from_ranks(part, ranks, k_order or "")

    def keys_of(self, part: Matrix, rank: Checkpoint) -> dict[str, torch.Tensor]:
        """A rank's stored tensors of a matrix, by suffix."""
        return {
            suffix: rank.tensor(f"{part.prefix}.{suffix}") for suffix in part.keys(len(self.ranks))
        }

    def _part(self, name: str) -> Part:
        part = self.parts.get(name)
        if part is None or not self._present(part):
            raise ErnieQuantError(f"{self.folder}: tensor {name} is missing from the checkpoint")
        return part

    def _present(self, part: Part) -> bool:
        return isinstance(part, Matrix) or part.key in self.ranks[0].headers


def open_fastdeploy(source: str | Path, k_order: str | None = None) -> FastDeployCheckpoint:
    """Open a FastDeploy checkpoint, reading headers only.

    Args:
        source: folder, or Hugging Face id of one without rank folders.
        k_order: K order of its WINT2 codes, "plain" or "mma64"; None: as its files record.

    Raises:
        ErnieQuantError: no such checkpoint, a tensor is missing, left over or of another shape or
            dtype, a rank is missing, or k_order contradicts the files.
    """
    folder, ranks, model, settings = _open(source)
    _require_none(folder, _problems(ranks, model, check_readable))
    recorded = _recorded_k_order(folder, settings, ranks)
    return FastDeployCheckpoint(folder, ranks, model, settings, choose_k_order(recorded, k_order))


def check_folder(source: str | Path) -> tuple[str, ...]:
    """Every deviation of a checkpoint from what we write and FastDeploy asks for, one line each:
    see `schema.check_keys`.

    Raises:
        ErnieQuantError: it cannot be opened at all.
    """
    _, ranks, model, _ = _open(source)
    return _problems(ranks, model, check_keys)


def _open(
    source: str | Path,
) -> tuple[Path, tuple[Checkpoint, ...], FastDeployModel, FastDeploySettings]:
    ranks = _open_ranks(expanded(source)) or (open_checkpoint(source),)
    config, folder = ranks[0].config, ranks[0].folder
    if len(ranks) > 1:
        folder = folder.parent
    settings = read_settings(config)
    if settings.tensor_parallel not in (None, len(ranks)):
        raise ErnieQuantError(
            f"{folder} was cut for {settings.tensor_parallel} ranks, but has {len(ranks)}; "
            "complete the copy"
        )
    _require_bounded(config, ranks[0].headers)
    architecture = text_moe(plain_config(config, "bfloat16"))
    model = fastdeploy_model(architecture, settings.w4_end_layer, len(ranks))
    if len(model.moe_layers) * model.experts > len(ranks[0].headers):
        raise ErnieQuantError(f"{folder} has fewer tensors than config.json has experts")
    return folder, ranks, model, settings


def _problems(ranks: tuple[Checkpoint, ...], model: FastDeployModel, check: Check) -> Lines:
    return tuple(
        f"rank{number}: {line}" if len(ranks) > 1 else line
        for number, rank in enumerate(ranks)
        for line in check(rank.headers, model)
    )


def _require_none(folder: Path, problems: Lines) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ErnieQuantError(f"{folder}: {problems[0]}{more}")


def _open_ranks(folder: Path) -> tuple[Checkpoint, ...]:
    """The rank folders of a folder, empty if it has none."""
    if not folder.is_dir():
        return ()
    named = ((_RANK.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    rank_folders = {int(match[1]): path for match, path in named if match}
    if not rank_folders:
        return ()
    if set(rank_folders) != set(range(len(rank_folders))) or len(rank_folders) < 2:
        missing = next(
            (n for n in range(max(rank_folders)) if n not in rank_folders), len(rank_folders)
        )
        raise ErnieQuantError(
            f"{folder} has {len(rank_folders)} rank folders, but no rank{missing}"
        )
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise ErnieQuantError(
            f"{folder} has both rank folders and weights of its own; remove one or the other"
        )
    config = read_config(folder)
    return tuple(
        Checkpoint(rank_folders[rank], config, _rank_headers(rank_folders[rank]))
        for rank in sorted(rank_folders)
    )


def _rank_headers(folder: Path) -> dict[str, TensorHeader]:
    if (folder / INDEX_FILE).is_file():
        return read_sharded(folder, folder / INDEX_FILE, {})
    if not (folder / SINGLE_FILE).is_file():
        raise ErnieQuantError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
    return read_header(folder / SINGLE_FILE)


def _require_bounded(config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Refuse more layers or experts than there are tensors, before a list of them is made."""
    for name in _COUNTS:
        value = config.get(name)
        if isinstance(value, int) and value > len(headers):
            raise ErnieQuantError(
                f"config.json has {name} {value}, but there are {len(headers)} tensors; it is "
                "damaged or belongs to another checkpoint"
            )


def _recorded_k_order(
    folder: Path, settings: FastDeploySettings, ranks: tuple[Checkpoint, ...]
) -> str | None:
    """The K order that config.json and the header of each rank's first file record."""
    orders = {settings.k_order}
    for rank in ranks:
        path = rank.folder / rank.shards[0]
        if path.is_file():  # otherwise not downloaded yet
            with wrap_errors(f"{path} cannot be read"), safe_open(path, framework="pt") as file:
                orders.add((file.metadata() or {}).get("k_order"))
    recorded = sorted(order for order in orders if order is not None)
    if len(recorded) > 1:
        raise ErnieQuantError(
            f"{folder} has files of k_order {' and '.join(recorded)}; they do not belong together"
        )
    return choose_k_order(None, recorded[0]) if recorded else None
