"""From a checkpoint to a quantised checkpoint: plan, stream layer by layer, write, report.

Each MoE layer is quantised on the inputs that the quantised layers before it give, aiming at what
the original would have made of the same text. Only one layer's non-expert weights and a few experts
are in memory.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from erniequant.calibration.texts import (
    CalibrationConfig,
    CalibrationWindows,
    calibration_windows,
)
from erniequant.checkpoint.reader import CONFIG_FILE, Checkpoint, open_checkpoint
from erniequant.checkpoint.writer import CheckpointWriter, copy_companions, write_json
from erniequant.devices import resolve_device
from erniequant.errors import ErnieQuantError
from erniequant.format.fit import require_fit
from erniequant.format.schema import GUARD, PROJECTIONS, LayerSpec, guard_tensor
from erniequant.models import ernie45_text as text_moe
from erniequant.models.ernie45_text import TextMoe
from erniequant.progress import NULL_PROGRESS, Progress
from erniequant.quantization.estimate import describe, estimate, peak_memory
from erniequant.quantization.expert import ExpertWeights, ProjectionCodes
from erniequant.quantization.layer import layer_context, quantize_experts
from erniequant.quantization.matrix import QuantizedMatrix, Rotation
from erniequant.quantization.plan import Plan, QuantizeOptions, make_plan
from erniequant.quantization.report import (
    REPORT_FILE,
    CalibrationReport,
    MatrixReport,
    QuantizationReport,
)
from erniequant.quantization.streams import Streams
from erniequant.rotation import pack_signs, random_signs
from erniequant.tokenizers import load_tokenizer
from erniequant.version import PRODUCER


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int,
    calib: str = "builtin",
    calib_samples: int = 128,
    calib_length: int = 1024,
    chat_template: str = "apply",
    no_calib: bool = False,
    effort: str = "standard",
    max_tp: int = 2,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    max_degraded: int = 0,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Make a quantised copy of an ERNIE 4.5 text MoE checkpoint.

    The output depends on the inputs, the options and the kind of processor, not on ``threads``.

    Args:
        src: folder or Hugging Face id of the bf16 checkpoint.
        dst: new or empty folder.
        bits: 2, 3 or 4 bits per expert weight.
        calib, calib_samples, calib_length, chat_template: see `CalibrationConfig`.
        no_calib: use no text; every input direction counts the same.
        effort: ``fast``, ``standard`` or ``max``: how long the registers of the codes are.
        max_tp: tensor parallelism that the result must split into.
        device: where layers run (``auto``, ``cpu``, ``cuda``); codes are searched on the CPU.
        threads: CPU threads; all cores by default.
        seed: of the rotation signs and the choice of calibration windows.
        dry_run: plan, report, and write nothing.
        max_degraded: recorded by the caller; nothing here depends on it.
        progress: observer.

    Raises:
        ErnieQuantError: anything wrong with the source, the options or the destination.
    """
    watch = progress or NULL_PROGRESS
    started = time.perf_counter()
    options = QuantizeOptions(bits, effort, max_tp, seed)
    calibration = CalibrationConfig(calib, calib_samples, calib_length, chat_template, seed)
    n_threads = threads or os.cpu_count() or 1
    checkpoint = open_checkpoint(src)
    config = text_moe.read_config(checkpoint.config)
    require_fit(checkpoint.config, checkpoint.headers)
    plan = make_plan(checkpoint, TextMoe.from_config(config), options)
    expected_tokens = 0 if no_calib else calibration.samples * calibration.length
    plan_text = describe(plan, estimate(plan, expected_tokens, n_threads), n_threads)
    watch.plan(plan_text)
    if dry_run:
        return QuantizationReport(plan, plan_text, None, (), 0.0, peak_memory(), {}, dry_run=True)

    windows = None if no_calib else _windows(checkpoint, calibration, plan.model, watch)
    run = _Run(checkpoint, config, plan, resolve_device(device), n_threads, watch)
    with _single_threaded_products(), torch.no_grad(), CheckpointWriter(dst) as writer:
        for name in plan.copied:
            writer.add(name, checkpoint.tensor(name))
        watch.start(len(plan.model.moe_layers) * plan.model.experts)
        try:
            matrices = tuple(run.layers(windows, writer))
        finally:
            watch.finish()
        settings = dict(checkpoint.config)
        settings["quantization_config"] = plan.metadata(PRODUCER).to_dict()
        written = writer.finish()
    report = QuantizationReport(
        plan,
        plan_text,
        _calibration_report(calibration, windows),
        matrices,
        time.perf_counter() - started,
        peak_memory(),
        written.sha256,
    )
    copy_companions(checkpoint.folder, Path(dst))
    write_json(Path(dst) / REPORT_FILE, report.to_dict())
    # The config comes last: without it nothing takes the folder for a finished checkpoint.
    write_json(Path(dst) / CONFIG_FILE, settings)
    return report


class _Run:
    """One pass over the layers of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        plan: Plan,
        device: torch.device,
        threads: int,
        watch: Progress,
    ) -> None:
        self.checkpoint, self.config, self.plan = checkpoint, config, plan
        self.device, self.threads, self.watch = device, threads, watch

    def layers(
        self, windows: CalibrationWindows | None, writer: CheckpointWriter
    ) -> Iterator[MatrixReport]:
        """Quantise layer after layer; without windows nothing flows and every Hessian is the
        identity."""
        streams = Streams(self.checkpoint, self.config, windows, self.device, self.threads)
        for index in range(self.plan.model.layers):
            if index in self.plan.model.moe_layers:
                yield from self._moe_layer(index, streams, writer)
            else:
                streams.through_dense_layer(index)

    def _moe_layer(
        self, index: int, streams: Streams, writer: CheckpointWriter
    ) -> Iterator[MatrixReport]:
        model, spec = self.plan.model, self.plan.layer
        rotations = {
            "gate_up_proj": self._rotation(
                index, 0, model.hidden, spec.gate_up_proj.rotation_block
            ),
            "down_proj": self._rotation(index, 1, model.inner, spec.down_proj.rotation_block),
        }
        inputs = streams.into_experts(index)
        context = layer_context(
            inputs, _codes(spec), rotations["gate_up_proj"], rotations["down_proj"]
        )
        packed: dict[str, list[QuantizedMatrix]] = {name: [] for name in PROJECTIONS}
        for outcome in quantize_experts(
            inputs, context, model.experts, lambda e: self._weights(index, e), self.threads
        ):
            streams.add(outcome)
            result = outcome.result
            packed["gate_up_proj"].append(result.gate_up.stored())
            packed["down_proj"].append(result.down.stored())
            for name, matrix in (("gate_up_proj", result.gate_up), ("down_proj", result.down)):
                yield MatrixReport(
                    index,
                    outcome.expert,
                    name,
                    outcome.tokens,
                    result.dropped,
                    matrix.error,
                    matrix.damping,
                    matrix.fallback,
                )
            self.watch.advance(1, f"layer {index} expert {outcome.expert}")
        prefix = text_moe.experts_prefix(index)
        writer.add(prefix + GUARD, guard_tensor())
        for name in PROJECTIONS:
            parts = 2 if name == "gate_up_proj" else 1
            signs = pack_signs(rotations[name].signs)
            matrices = packed[name]
            writer.add(f"{prefix}{name}_packed", torch.stack([m.packed for m in matrices]))
            writer.add(f"{prefix}{name}_scale", torch.stack([m.scale_bits() for m in matrices]))
            writer.add(f"{prefix}{name}_signs", signs.expand(1, parts, -1).contiguous())

    def _rotation(self, layer: int, projection: int, inputs: int, block: int) -> Rotation:
        seed = (self.plan.options.seed * 1_000_003 + layer) * 2 + projection
        return Rotation(random_signs(inputs, torch.Generator().manual_seed(seed)), block)

    def _weights(self, layer: int, expert: int) -> ExpertWeights:
        return ExpertWeights(
            *(
                self._expert_matrix(text_moe.expert_matrix_name(layer, expert, matrix))
                for matrix in text_moe.EXPERT_MATRICES
            )
        )

    def _expert_matrix(self, name: str) -> torch.Tensor:
        weight = self.checkpoint.tensor(name).float()
        if not torch.isfinite(weight).all():
            raise ErnieQuantError(f"{name} holds inf or nan; the source checkpoint is damaged")
        return weight


def _codes(spec: LayerSpec) -> ProjectionCodes:
    return ProjectionCodes(
        spec.gate_up_proj.conv(), spec.gate_up_proj.tile, spec.down_proj.conv(), spec.down_proj.tile
    )


def _windows(
    checkpoint: Checkpoint, config: CalibrationConfig, model: TextMoe, watch: Progress
) -> CalibrationWindows:
    tokenizer = load_tokenizer(checkpoint.folder, or_else="add its files or use --no-calib")
    windows = calibration_windows(tokenizer, config)
    top = max(int(ids.max()) for ids in windows.windows)
    if top >= model.vocabulary:
        raise ErnieQuantError(
            f"the tokenizer of {checkpoint.folder} makes token id {top}, but the model has "
            f"{model.vocabulary}"
        )
    watch.message(
        f"calibrating on {windows.tokens} tokens in {len(windows.windows)} windows of "
        f"{config.source}; "
        f"the first document begins {windows.rendered[:80]!r}"
    )
    return windows


def _calibration_report(
    config: CalibrationConfig, windows: CalibrationWindows | None
) -> CalibrationReport | None:
    if windows is None:
        return None
    return CalibrationReport(
        config.source, len(windows.windows), windows.tokens, windows.sha256, windows.rendered
    )


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Run every product on one thread: their rounding depends on how many share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
