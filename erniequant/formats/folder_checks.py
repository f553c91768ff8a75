"""Checks of a checkpoint's folder in any format: its files, its origin, its distance from the
original."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.adapters import adapter_problem
from erniequant.checkpoint.folder import REPORT_FILE, require_whole_companions
from erniequant.checkpoint.reader import Checkpoint, read_json
from erniequant.errors import ErnieQuantError
from erniequant.formats.results import MatrixError

# Entries of the report that say where the weights come from; the rest is about their quality.
_PROVENANCE = ("bits", "effort", "seed", "calibration", "seconds", "degraded")


def folder_notes(folder: Path) -> tuple[str, ...]:
    """A line for everything beside the weights that `erniequant.load` refuses."""
    problem = adapter_problem(folder)
    return () if problem is None else (problem,)


def provenance(folder: Path) -> dict[str, Any]:
    """The origin of the weights according to the report beside them; empty without one."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    report = read_json(path)
    return {name: report[name] for name in _PROVENANCE if name in report}


def folder_problems(folder: Path) -> Iterator[str]:
    """Problems outside the weights that keep a checkpoint from being used: an adapter, and files
    that only seem to be there."""
    problem = adapter_problem(folder)
    if problem is not None:
        yield problem
    try:
        require_whole_companions(folder)
    except ErnieQuantError as error:
        yield str(error)


def matrix_error(
    original: Checkpoint, name: str, weight: torch.Tensor, problems: list[str]
) -> MatrixError | None:
    """The error of a decoded matrix; adds a line to ``problems`` if the original has no such
    matrix."""
    header = original.headers.get(name)
    if header is None or header.shape != tuple(weight.shape):
        problems.append(f"the reference has no tensor {name} of shape {list(weight.shape)}")
        return None
    exact = original.tensor(name).float()
    power = exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return MatrixError(name, float((weight - exact).square().sum() / power))
