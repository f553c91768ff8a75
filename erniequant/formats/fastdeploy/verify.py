"""Verify a FastDeploy checkpoint: every key is there, and everything decodes; with the original,
also the error of every matrix."""

from pathlib import Path

import torch

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.export import detect_k_order
from erniequant.formats.fastdeploy.reader import check_folder, open_fastdeploy
from erniequant.formats.folder_checks import folder_problems, matrix_error
from erniequant.formats.results import VerifyReport
from erniequant.packing.file_check import file_states


def verify_fastdeploy(source: str | Path, reference: str | Path | None = None) -> VerifyReport:
    """Check a FastDeploy checkpoint, against its original when given.

    Raises:
        ErnieQuantError: it cannot be read at all, or the original is another model.
    """
    problems = list(check_folder(source))
    opened = open_fastdeploy(source)
    original = None if reference is None else open_checkpoint(reference)
    if opened.k_order is None and original is not None:
        opened.k_order = detect_k_order(opened, original)
    problems += folder_problems(opened.folder)
    checksums = file_states(opened.folder)
    problems += [
        f"file {name} is missing or was changed" for name, s in checksums.items() if s != "ok"
    ]
    decoded, errors = 0, []
    for name in opened.names():
        try:
            weight = opened.tensor(name).float()
        except ErnieQuantError as error:
            problems.append(str(error))
            continue
        if not bool(torch.isfinite(weight).all()):
            problems.append(f"tensor {name} does not decode to finite numbers")
            continue
        if not opened.is_decoded(name):
            continue
        decoded += 1
        if original is not None:
            errors.append(matrix_error(original, name, weight, problems))
    tensors = sum(len(rank.headers) for rank in opened.ranks)
    return VerifyReport(
        str(opened.folder),
        tuple(problems),
        tensors,
        decoded,
        checksums,
        tuple(entry for entry in errors if entry is not None),
    )
