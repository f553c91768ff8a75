"""From a checkpoint to a quantised checkpoint: plan, stream layer by layer, write, report.

One stream of hidden states runs through the layers; each MoE layer is quantised on its actual
inputs and the states go on through the quantised experts. Only one layer's non-expert weights and
a few experts are in memory.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from erniequant.errors import ErnieQuantError
from erniequant.format.schema import GUARD, PROJECTIONS, LayerSpec, guard_tensor
from erniequant.models import ernie45_text as text_moe
from erniequant.models.ernie45_text import MoeInput, TextMoe
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
from erniequant.rotation import pack_signs, random_signs
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
        effort: ``fast``, ``standard`` or ``max``: register length 10, 12 or 16.
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
    plan = make_plan(checkpoint, TextMoe.from_config(config), options)
    expected_tokens = 0 if no_calib else calibration.samples * calibration.length
    plan_text = describe(plan, estimate(plan, expected_tokens, n_threads), n_threads)
    watch.plan(plan_text)
    if dry_run:
        return QuantizationReport(plan, plan_text, None, (), 0.0, peak_memory(), {}, dry_run=True)

    windows = None if no_calib else _windows(checkpoint, calibration, plan.model, watch)
    run = _Run(checkpoint, config, plan, _device(device), n_threads, watch)
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
        hidden = self._embed(windows) if windows else []
        for index in range(self.plan.model.layers):
            is_moe = index in self.plan.model.moe_layers
            if windows:
                layer = text_moe.load_layer(self.checkpoint, self.config, index, self.device)
                hidden = self._map(
                    lambda h, m=layer: text_moe.attend(m, h, self._positions(h)), hidden
                )
                if not is_moe:
                    hidden = self._map(lambda h, m=layer: text_moe.dense_mlp(m, h), hidden)
                    continue
                routed = self._map(lambda h, m=layer: text_moe.route(m, h), hidden)
                del layer
                lengths = [base.shape[1] for base, _ in routed]
                states = torch.cat([base[0] for base, _ in routed]).cpu()
                inputs = _join([inner for _, inner in routed])
                hidden, routed = [], []
            elif is_moe:
                lengths, states, inputs = [], torch.zeros(0), _no_tokens(self.plan.model)
            else:
                continue
            yield from self._moe_layer(index, inputs, states, writer)
            hidden = (
                [part[None].to(self.device) for part in states.split(lengths)] if windows else []
            )

    def _moe_layer(
        self, index: int, inputs: MoeInput, states: torch.Tensor, writer: CheckpointWriter
    ) -> Iterator[MatrixReport]:
        model, spec = self.plan.model, self.plan.layer
        rotations = {
            "gate_up_proj": self._rotation(
                index, 0, model.hidden, spec.gate_up_proj.rotation_block
            ),
            "down_proj": self._rotation(index, 1, model.inner, spec.down_proj.rotation_block),
        }
        context = layer_context(
            inputs, _codes(spec), rotations["gate_up_proj"], rotations["down_proj"]
        )
        packed: dict[str, list[QuantizedMatrix]] = {name: [] for name in PROJECTIONS}
        for outcome in quantize_experts(
            inputs, context, model.experts, lambda e: self._weights(index, e), self.threads
        ):
            # In the order of experts, so that the sum does not depend on the number of threads.
            if outcome.positions.numel():
                states.index_add_(0, outcome.positions, outcome.output)
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

    def _embed(self, windows: CalibrationWindows) -> list[torch.Tensor]:
        table = self.checkpoint.tensor("model.embed_tokens.weight")
        return [table[ids].float()[None].to(self.device) for ids in windows.windows]

    def _positions(self, hidden: torch.Tensor) -> Any:
        return text_moe.position_embeddings(self.config, hidden.shape[1], self.device)

    def _map(self, function: Any, items: list[Any]) -> list[Any]:
        if self.device.type != "cpu":
            return [function(item) for item in items]

        def one(item: Any) -> Any:
            # Both settings belong to a thread.
            torch.set_num_threads(1)
            with torch.no_grad():
                return function(item)

        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(one, items))


def _codes(spec: LayerSpec) -> ProjectionCodes:
    return ProjectionCodes(
        spec.gate_up_proj.conv(), spec.gate_up_proj.tile, spec.down_proj.conv(), spec.down_proj.tile
    )


def _join(parts: list[MoeInput]) -> MoeInput:
    return MoeInput(
        torch.cat([p.x for p in parts]).float().cpu(),
        torch.cat([p.expert for p in parts]).cpu(),
        torch.cat([p.weight for p in parts]).float().cpu(),
    )


def _no_tokens(model: TextMoe) -> MoeInput:
    empty = torch.zeros(0, model.top_k)
    return MoeInput(torch.zeros(0, model.hidden), empty.long(), empty)


def _windows(
    checkpoint: Checkpoint, config: CalibrationConfig, model: TextMoe, watch: Progress
) -> CalibrationWindows:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except Exception as error:  # tokenizer files fail in as many ways as there are kinds
        reason = " ".join(str(error).split())[:200]
        raise ErnieQuantError(
            f"no tokenizer can be loaded from {checkpoint.folder}: {reason}; add its files or "
            "use --no-calib"
        ) from error
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ErnieQuantError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise ErnieQuantError(f"device must be auto, cpu or cuda, not {name!r}")
    return torch.device(name)


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Run every product on one thread: their rounding depends on how many share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
