"""Checks of weights against the report beside them: checksums of the files, and the codes."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from erniequant.checkpoint.files import sha256_of
from erniequant.checkpoint.folder import REPORT_FILE
from erniequant.checkpoint.reader import Checkpoint, read_json
from erniequant.checkpoint.strict_json import is_plain_file_name
from erniequant.errors import ErnieQuantError
from erniequant.packing.experts import HeaderCheck

_WEIGHTS_SUFFIX = ".safetensors"


def file_states(folder: Path) -> dict[str, str]:
    """ "ok", "differs" or "missing" for every file that the report lists; empty without a report.

    Raises:
        ErnieQuantError: the report cannot be read, lists nothing, or names files elsewhere.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    listed = read_json(path).get("sha256")
    if not isinstance(listed, dict) or not listed:
        raise ErnieQuantError(f"{path} lists no sha256 of any file; it is damaged")
    states = {}
    for name, digest in listed.items():
        if not is_plain_file_name(name):
            raise ErnieQuantError(f"{path} lists {name!r}, which is not in its folder")
        file = folder / name
        states[name] = "missing" if not file.is_file() else "ok"
        if file.is_file() and sha256_of(file) != digest:
            states[name] = "differs"
    return states


def tuned_names(folder: Path) -> frozenset[str]:
    """Tensors that were trained, as the report beside the weights lists them; none without it.

    Raises:
        ErnieQuantError: the report cannot be read.
    """
    path = folder / REPORT_FILE
    stages = read_json(path).get("tuned") if path.is_file() else None
    if not isinstance(stages, list):
        return frozenset()
    moved = [stage.get("moved") for stage in stages if isinstance(stage, dict)]
    return frozenset(name for names in moved if isinstance(names, dict) for name in names)


def report_problems(
    checkpoint: Checkpoint, check: HeaderCheck, states: Mapping[str, str]
) -> Iterator[str]:
    """Every deviation of a checkpoint from its report; ``states`` from `file_states`."""
    if not states:
        return
    for name, state in states.items():
        if state != "ok":
            yield f"file {name} is missing or was changed: its sha256 is not that of {REPORT_FILE}"
        elif name.endswith(_WEIGHTS_SUFFIX) and name not in checkpoint.shards:
            yield f"file {name} of {REPORT_FILE} is not among the files of the index"
    for name in checkpoint.shards:
        if name not in states:
            yield f"file {name} holds tensors, but {REPORT_FILE} does not list it"
    written = read_json(checkpoint.folder / REPORT_FILE).get("format")
    for layer in check.layers:
        if not isinstance(written, dict):
            continue
        group = layer.key.partition(".")[2]
        if asdict(layer.spec) != written.get(group, written):
            yield f"quantization_config gives layer {layer.key} another code than {REPORT_FILE}"


def require_as_reported(checkpoint: Checkpoint, check: HeaderCheck) -> None:
    """Refuse a checkpoint with the first of its `report_problems`."""
    for line in report_problems(checkpoint, check, file_states(checkpoint.folder)):
        raise ErnieQuantError(f"{checkpoint.folder}: {line}; copy it again or run verify")
