"""A quantisation before it begins: the source looked at, everything planned, its cost predicted."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.calibration.config import CalibrationConfig
from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.folder import describe_left_behind, left_behind, require_apart
from erniequant.checkpoint.reader import INDEX_FILE, Checkpoint, open_checkpoint
from erniequant.data.companions import require_companions
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import OutputFormat
from erniequant.formats.plan import Plan, QuantizeOptions
from erniequant.formats.registry import check_options
from erniequant.models.architecture import Architecture
from erniequant.models.config_check import bounded_architecture
from erniequant.paths import expanded
from erniequant.quantization.calibration_input import Calibration, amounts, image_note, prepare
from erniequant.quantization.engines import check_engine, engine_note
from erniequant.quantization.estimate import Estimate, describe, estimate
from erniequant.quantization.memory import (
    MemoryInputs,
    MemoryPlan,
    default_budget,
    largest_layer,
    parse_size,
    plan_memory,
)
from erniequant.quantization.options import RunOptions
from erniequant.quantization.report import QuantizationReport
from erniequant.quantization.tuning_cost import (
    TuningBytes,
    tuning_bytes,
    tuning_disk,
    tuning_seconds,
)
from erniequant.system import resolve_device


@dataclass(frozen=True)
class CalibrationRequest:
    """The calibration request, as it is given to `erniequant.quantize`."""

    data: Any
    config: CalibrationConfig


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read.

    Attributes:
        calibration: None without calibration.
        left_behind: names of files that are in the source's folder and not in the result.
        text: the plan for people.
    """

    checkpoint: Checkpoint
    model: Architecture
    output: OutputFormat
    plan: Plan
    calibration: Calibration | None
    memory: MemoryPlan
    device: torch.device
    threads: int
    predicted: Estimate
    left_behind: tuple[str, ...]
    text: str

    def dry_report(self) -> QuantizationReport:
        """The report of a dry run."""
        return QuantizationReport(
            self.plan, self.text, None, (), self.predicted, None, {}, dry_run=True,
            left_behind=self.left_behind,
        )  # fmt: skip


def plan_job(
    src: str | Path,
    dst: str | Path,
    options: QuantizeOptions,
    request: CalibrationRequest | None,
    run: RunOptions,
) -> Job:
    """Look at the source and plan its quantisation into ``dst``; nothing is written.

    Raises:
        ErnieQuantError: anything wrong with the source or the options.
    """
    chosen = check_options(options)
    check_engine(run)
    device = resolve_device(run.device)
    checkpoint = open_checkpoint(src)
    require_no_adapter(checkpoint.folder)
    require_apart(checkpoint.folder, expanded(dst))
    model = bounded_architecture(checkpoint.config, checkpoint.headers)
    output, plan = chosen.output(checkpoint, model, options)
    vocabulary = require_companions(checkpoint.folder)
    threads = run.threads or os.cpu_count() or 1
    calibration = None
    if request is not None:
        calibration = prepare(request.data, request.config, model, run.dry_run)
    tokens, length, patches = (0, 2, 0) if calibration is None else amounts(calibration, model)
    layer = largest_layer(checkpoint, model)
    tuning = tuning_bytes(model, plan, length, layer) if tokens else TuningBytes()
    needs = MemoryInputs(tokens, length, patches, layer, chosen.encoder_bytes, tuning)
    memory = _fit(model, needs, threads, run.max_memory, device)
    training = tuning_seconds(model, plan, tokens) if tokens else 0.0
    kept = tuning_disk(model, plan, tokens, layer) if tokens else 0
    predicted = estimate(plan, memory, tokens, chosen.encode_rate(options), training, kept)
    left = left_behind(checkpoint.folder, {INDEX_FILE, *checkpoint.shards})
    lines = [
        describe(plan, memory, predicted, checkpoint.absent_bytes),
        engine_note(run),
        image_note(calibration) if model.images is not None and calibration is not None else "",
        _vocabulary_note(vocabulary, model.sizes.vocabulary),
        describe_left_behind(left),
    ]
    text = "\n".join(filter(None, lines))
    return Job(
        checkpoint, model, output, plan, calibration, memory, device, threads, predicted, left, text
    )


def _vocabulary_note(tokens: int, vocabulary: int) -> str:
    if tokens <= vocabulary:
        return ""
    return (
        f"the tokenizer has {tokens} tokens, the model {vocabulary}: text with any of the extra "
        "tokens cannot be run"
    )


def _fit(
    model: Architecture,
    needs: MemoryInputs,
    threads: int,
    max_memory: str | int | None,
    device: torch.device,
) -> MemoryPlan:
    """The plan that keeps the run within its memory; an explicit bound that is too small is
    refused."""
    asked = parse_size(str(max_memory)) if max_memory is not None else None
    budget = default_budget() if asked is None else asked
    memory = plan_memory(model, needs, threads, budget, device.type == "cpu")
    if asked is not None and memory.peak_bytes > asked:
        raise ErnieQuantError(
            f"--max-memory {max_memory} is too little: with one expert at a time and activations "
            f"on disk the run takes about {memory.peak_bytes / 1e9:.1f} GB; give that, or use "
            "shorter windows (--calib-length)"
        )
    return memory
