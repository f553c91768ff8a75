"""The facts in which a continued run must agree with its beginning, so that the result is that of
an uninterrupted run."""

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from erniequant.calibration.config import CalibrationConfig
from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.files import sha256_of
from erniequant.checkpoint.folder import companion_files
from erniequant.checkpoint.reader import CONFIG_FILE, Checkpoint
from erniequant.formats.plan import Plan
from erniequant.system import fast_bfloat16

_PACKAGES = ("torch", "transformers", "numba", "numpy")


def run_identity(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: CalibrationConfig | None,
    windows: CalibrationWindows | None,
    device: torch.device,
) -> dict[str, Any]:
    """Options, versions, and hashes of the source and the calibration text, by the name under which
    a user knows them. The weights themselves are hashed later, shard by shard."""
    headers = [[h.name, h.stored_dtype, *h.shape] for h in checkpoint.headers.values()]
    facts: dict[str, Any] = {
        "--bits": plan.options.bits,
        "--effort": plan.options.effort,
        "--max-tp": plan.options.max_tp,
        "--seed": plan.options.seed,
        "--tune": plan.options.tune,
        "--sensitivity": plan.options.sensitivity,
        "--search": plan.options.search,
        "--device": device.type,
        "--format": plan.options.format,
        "the plan": _plan_digest(plan),
        "calibration": "none" if windows is None else "text",
        "the source's config.json": sha256_of(checkpoint.folder / CONFIG_FILE),
        "the source's tensors": _digest([json.dumps(header).encode() for header in headers]),
        "the source's other files": _files_digest(checkpoint.folder),
    }
    if windows is not None and calibration is not None:
        facts |= {
            "--calib": calibration.source,
            "--calib-samples": calibration.samples,
            "--calib-length": calibration.length,
            "--chat-template": calibration.chat_template,
            "the calibration text": windows.sha256,
        }
    return facts | {f"{name} version": found for name, found in package_versions().items()}


def package_versions() -> dict[str, str]:
    """Versions of the packages that the result depends on, by name."""
    return {name: version(name) for name in ("erniequant", *_PACKAGES)}


def processor() -> str:
    """The kind of processor; another one rounds differently."""
    fast = " with bfloat16" if fast_bfloat16() else ""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{fast}"


def _plan_digest(plan: Plan) -> str:
    """Digest of the codes and of every tensor to be written: later versions may make others from
    the same options."""
    tensors = [[t.name, t.stored_dtype, *t.shape] for t in plan.packed]
    return _digest([json.dumps([dict(plan.settings), tensors, plan.copied]).encode()])


def _files_digest(folder: Path) -> str:
    return _digest(
        f"{path.relative_to(folder)} {sha256_of(path)}".encode() for path in companion_files(folder)
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\n")
    return digest.hexdigest()
