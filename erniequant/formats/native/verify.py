"""Verify a quantised checkpoint: completeness, checksums, and that all weights decode.

With the original at hand, also the error of every matrix, and that all other tensors are unchanged,
unless the report says that they were trained.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.formats.folder_checks import folder_problems, matrix_error
from erniequant.formats.results import VerifyReport
from erniequant.models.config_check import misfits
from erniequant.models.header_check import check_headers, kept_names
from erniequant.packing.decoding import expert_matrices
from erniequant.packing.experts import QuantizedExperts
from erniequant.packing.file_check import file_states, report_problems, tuned_names
from erniequant.packing.schema import PROJECTIONS
from erniequant.runtime.decoding import decode_fast


def verify_native(model_dir: str | Path, reference: str | Path | None = None) -> VerifyReport:
    """Check a quantised checkpoint, against its original when given (folders or Hugging Face ids).

    Raises:
        ErnieQuantError: it cannot be read at all: no weights, truncated shards, not quantised.
    """
    checkpoint = open_checkpoint(model_dir)
    checkpoint.fetch()
    original = open_checkpoint(reference) if reference is not None else None
    check = check_headers(checkpoint)
    problems = list(check.problems)
    quantized = {layer.key for layer in check.layers}
    problems += misfits(checkpoint.config, checkpoint.headers, quantized)
    problems += folder_problems(checkpoint.folder)
    checksums = file_states(checkpoint.folder)
    problems += report_problems(checkpoint, check, checksums)
    tuned = tuned_names(checkpoint.folder)
    for name in kept_names(checkpoint, check.layers):
        problems += _kept_problems(checkpoint, name, original, name in tuned)
    if original is not None:
        coded = {
            layer.original_name(expert, matrix)
            for layer in check.layers
            for expert in range(layer.experts)
            for matrix in ("gate_proj", "up_proj", "down_proj")
        }
        problems += [
            f"tensor {name} of the reference is missing"
            for name in original.names()
            if name not in coded and name not in checkpoint.headers
        ]
    # Tensors of another shape cannot be decoded; their layers are named among the problems already.
    decodable = [
        layer for layer in check.layers if not any(layer.prefix in line for line in check.problems)
    ]
    decoded, errors = 0, []
    for layer in decodable:
        problems += _sign_problems(checkpoint, layer)
        for name, weight in expert_matrices(checkpoint, layer, decode_fast):
            decoded += 1
            if not torch.isfinite(weight).all():
                problems.append(f"tensor {name} does not decode to finite numbers")
            elif original is not None:
                errors.append(matrix_error(original, name, weight, problems))
    return VerifyReport(
        str(checkpoint.folder), tuple(problems), len(checkpoint.headers), decoded, checksums,
        tuple(entry for entry in errors if entry is not None),
    )  # fmt: skip


def _sign_problems(checkpoint: Checkpoint, layer: QuantizedExperts) -> Iterator[str]:
    for projection in PROJECTIONS:
        name = layer.name(projection, "signs")
        signs = checkpoint.tensor(name)[0]
        if not bool((signs == signs[0]).all()):
            yield f"tensor {name} has rows that differ; they must be equal"


def _kept_problems(
    checkpoint: Checkpoint, name: str, original: Checkpoint | None, tuned: bool
) -> Iterator[str]:
    tensor = checkpoint.tensor(name)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        yield f"tensor {name} holds numbers that are not finite"
    if original is None:
        return
    if name not in original.headers:
        yield f"tensor {name} is not in the reference"
    else:
        exact = original.tensor(name)
        same = tensor.dtype == exact.dtype and tensor.shape == exact.shape
        if tuned and not same:
            yield f"tensor {name} was trained, but has another shape or type than the reference"
        elif not tuned and not (same and torch.equal(tensor, exact)):
            yield f"tensor {name} differs from the reference, of which it should be a copy"
