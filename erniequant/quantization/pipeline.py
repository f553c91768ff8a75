"""From a checkpoint to a quantised checkpoint: plan, stream layer by layer, write, report.

Each MoE layer is quantised on the inputs that the quantised layers before it give, aiming at what
the original would have made of the same text. Only one layer's non-expert weights and a few experts
are in memory. Interrupted anywhere, the same call continues (`erniequant.resume`).
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erniequant.calibration.config import CalibrationConfig
from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.files import disk_error, write_json
from erniequant.checkpoint.folder import (
    REPORT_FILE,
    describe_left_behind,
    left_behind,
    require_apart,
)
from erniequant.checkpoint.layout import index_of
from erniequant.checkpoint.reader import (
    CONFIG_FILE,
    INDEX_FILE,
    WORK_FOLDER,
    Checkpoint,
    open_checkpoint,
)
from erniequant.checkpoint.shards import ShardFiles
from erniequant.checkpoint.writer import MAX_SHARD_BYTES
from erniequant.data.companions import require_companions, write_companions
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import OutputFormat
from erniequant.formats.native.output import NativeOutput
from erniequant.formats.plan import NATIVE, Plan, QuantizeOptions, make_plan
from erniequant.models.architecture import Architecture
from erniequant.models.config_check import bounded_architecture
from erniequant.paths import expanded
from erniequant.progress import Progress, observed
from erniequant.quantization.calibration_input import (
    amounts,
    calibration_report,
    image_note,
    prepare,
    read_windows,
)
from erniequant.quantization.estimate import Estimate, describe, estimate
from erniequant.quantization.memory import (
    MemoryPlan,
    Needs,
    default_budget,
    largest_layer,
    parse_size,
    peak_memory,
    peak_vram,
    plan_memory,
)
from erniequant.quantization.report import (
    QuantizationReport,
)
from erniequant.quantization.run import Run
from erniequant.quantization.run_identity import processor, run_identity
from erniequant.resume.workfolder import WorkFolder
from erniequant.system import resolve_device, return_freed_memory

SIZE_TOLERANCE = 0.01
"""The result may differ from the planned size by this much, headers included."""


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int,
    format: str = NATIVE,
    k_order: str | None = None,
    w4_layers: int | None = None,
    calib: str | Path | Iterable[Any] = "builtin",
    calib_samples: int = 128,
    calib_length: int = 1024,
    chat_template: str = "apply",
    no_calib: bool = False,
    effort: str = "standard",
    max_tp: int = 2,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    max_memory: str | int | None = None,
    resume: bool | None = None,
    dry_run: bool = False,
    max_degraded: int = 0,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Make a quantised copy of an ERNIE 4.5 checkpoint, of text or of vision and language.

    The output depends on the inputs, the options and the kind of processor, not on ``threads``,
    ``max_memory``, or whether the run was interrupted.

    Args:
        src: folder or Hugging Face id of the bf16 checkpoint.
        dst: new or empty folder, or that of an unfinished run with the same options.
        bits: 2, 3 or 4 bits per expert weight.
        format: ``native``, or ``fastdeploy-wint2`` (2 bits): what FastDeploy serves.
        k_order: ``mma64`` (default) or ``plain``: of WINT2, see docs/fastdeploy.md.
        w4_layers: of FastDeploy's format, the number of first MoE layers with experts of 4 bits; by
            default one in thirteen.
        calib, calib_samples, calib_length, chat_template: see `CalibrationConfig`. ``calib`` may
            also be texts, chats (lists of messages), records, paths, token ids or batches that
            are ready for the model (see `erniequant.data.inputs.sequences_of`), as a list, a data
            set, a DataLoader or an iterator. All batches of a list are used; other things are
            read as far as needed, an iterator once, and by a dry run not at all.
        no_calib: use no text; every input direction counts the same.
        effort: ``fast``, ``standard`` or ``max``: how long the registers of the codes are.
        max_tp: tensor parallelism that the result must split into.
        device: where layers run (``auto``, ``cpu``, ``cuda``); codes are searched on the CPU.
        threads: CPU threads; all cores by default.
        seed: of the rotation signs and the choice of calibration windows.
        work_dir: folder for the journal and the hidden states of an unfinished run; inside
            ``dst`` by default. It has to be one of its own.
        max_memory: bytes, or text such as "16GB": what the run may take. 85 % of the free memory
            by default.
        resume: True: only continue an unfinished run. False: discard it and start over. None:
            continue one if it is there.
        dry_run: plan, report, and write nothing.
        max_degraded: recorded by the caller; nothing here depends on it.
        progress: observer.

    Raises:
        ErnieQuantError: anything wrong with the source, the options or the destination.
    """
    watch = observed(progress)
    options = QuantizeOptions(bits, effort, max_tp, seed, format, k_order, w4_layers)
    settings = CalibrationConfig("builtin", calib_samples, calib_length, chat_template, seed)
    target = resolve_device(device)
    checkpoint = open_checkpoint(src)
    require_no_adapter(checkpoint.folder)
    require_apart(checkpoint.folder, expanded(dst))
    model = bounded_architecture(checkpoint.config, checkpoint.headers)
    output, plan = _output(checkpoint, model, options)
    vocabulary = require_companions(checkpoint.folder)
    threads = threads or os.cpu_count() or 1
    calibration = None if no_calib else prepare(calib, settings, model, dry_run)
    tokens, length, patches = (0, 2, 0) if calibration is None else amounts(calibration, model)
    needs = Needs(tokens, length, patches, largest_layer(checkpoint, model), wint2=format != NATIVE)
    memory = _fit(model, needs, threads, max_memory, target)
    predicted = estimate(plan, memory, tokens)
    plan_text = describe(plan, memory, predicted, checkpoint.absent_bytes)
    if model.images is not None and calibration is not None:
        plan_text += f"\n{image_note(calibration)}"
    if vocabulary > model.sizes.vocabulary:
        plan_text += (
            f"\nthe tokenizer has {vocabulary} tokens, the model {model.sizes.vocabulary}: "
            "text with any of the others cannot be run"
        )
    left = left_behind(checkpoint.folder, {INDEX_FILE, *checkpoint.shards})
    if left:
        plan_text += f"\n{describe_left_behind(left)}"
    watch.plan(plan_text)
    if dry_run:
        return QuantizationReport(
            plan, plan_text, None, (), predicted, None, {}, dry_run=True, left_behind=left
        )

    windows = None
    if calibration is not None:
        settings = calibration.config
        windows = read_windows(checkpoint, model, calibration, watch)
    identity = run_identity(checkpoint, plan, settings, windows, target)
    destination = expanded(dst)
    if work_dir is not None:
        identity["the destination"] = str(destination.resolve())
    with (
        _opened(destination, work_dir, resume) as work,
        ShardFiles(destination, output.shards(MAX_SHARD_BYTES)) as shards,
        _single_threaded_products(),
        torch.no_grad(),
    ):
        return_freed_memory()
        work.begin(identity)
        run = Run(checkpoint, model, output, memory, target, threads, work, shards, watch)
        _note_processor(work, watch)
        watch.start(len(plan.model.moe_layers) * plan.model.experts)
        try:
            shards.prepare()
            watch.advance(0, "checking the source")
            run.check_source()
            watch.advance(0, "copying")
            run.copy_tensors()
            run.quantize_layers(windows)
        except ErnieQuantError:
            if not run.has_experts:
                # Nothing that took long is lost, and the destination stays usable.
                shards.remove()
                work.clear()
            raise
        finally:
            watch.finish()
        measured = Estimate(
            work.journal.seconds(), peak_memory(), peak_vram(target), run.disk_peak()
        )
        report = QuantizationReport(
            plan,
            plan_text,
            calibration_report(settings, windows),
            run.matrices(),
            predicted,
            measured,
            {event["file"]: event["sha256"] for event in work.journal.of("shard")},
            sessions=len(work.journal.of("session")),
            layer_seconds=tuple(work.journal.seconds_of("layer")),
            left_behind=left,
        )
        _complete(checkpoint, output, shards, report)
        work.remove()
    return report


def _output(
    checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions
) -> tuple[OutputFormat, Plan]:
    """The layout of the result, and the plan for it."""
    if options.format == NATIVE:
        plan = make_plan(checkpoint, model, options)
        return NativeOutput(checkpoint, model, plan), plan
    from erniequant.formats.fastdeploy.output import fastdeploy_output, text_moe_of

    text_moe_of(model)
    # Its own ranks are cut from the result, so the native codes need not be divisible.
    return fastdeploy_output(
        checkpoint, model, make_plan(checkpoint, model, replace(options, max_tp=1))
    )


def _fit(
    model: Architecture,
    needs: Needs,
    threads: int,
    max_memory: str | int | None,
    device: torch.device,
) -> MemoryPlan:
    """How the run goes within its memory; an explicit bound that is too small is refused."""
    asked = parse_size(str(max_memory)) if max_memory is not None else None
    budget = default_budget() if asked is None else asked
    found = plan_memory(model, needs, threads, budget, device.type == "cpu")
    if asked is not None and found.peak_bytes > asked:
        raise ErnieQuantError(
            f"--max-memory {max_memory} is too little: with one expert at a time and activations "
            f"on disk the run takes about {found.peak_bytes / 1e9:.1f} GB; give that, or use "
            "shorter windows (--calib-length)"
        )
    return found


@contextmanager
def _opened(
    destination: Path, work_dir: str | Path | None, resume: bool | None
) -> Iterator[WorkFolder]:
    """The locked work folder of a run into ``destination``, which is new, empty or the run's."""
    made = not destination.exists()
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(destination, error) from error
    try:
        work = WorkFolder(expanded(work_dir) if work_dir else destination / WORK_FOLDER)
        try:
            _prepare_destination(destination, work, resume)
            yield work
        finally:
            work.release()
    finally:
        if made and not any(destination.iterdir()):
            destination.rmdir()


def _prepare_destination(destination: Path, work: WorkFolder, resume: bool | None) -> None:
    if work.unfinished() and resume is False and not (destination / CONFIG_FILE).exists():
        for path in destination.iterdir():
            if _SHARD.fullmatch(path.name) or path.name in (INDEX_FILE, REPORT_FILE):
                path.unlink()
        work.clear()
        return
    if work.unfinished():
        return
    if resume:
        raise ErnieQuantError(
            f"there is no unfinished run in {work.folder}; leave out --resume to start one"
        )
    if any(path != work.folder for path in destination.iterdir()):
        raise ErnieQuantError(f"{destination} is not empty; give a new folder")


_SHARD = re.compile(r"\.?model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")


def _note_processor(work: WorkFolder, watch: Progress) -> None:
    known = {event["processor"] for event in work.journal.of("processor")}
    if processor() not in known:
        if known:
            watch.message(
                f"this run was begun on another kind of processor ({', '.join(sorted(known))}); "
                "the result is sound, but not to the last bit that of either"
            )
        work.journal.append("processor", processor=processor())


def _complete(
    checkpoint: Checkpoint,
    output: OutputFormat,
    shards: ShardFiles,
    report: QuantizationReport,
) -> None:
    """Write everything that is not weights."""
    folder, plan = shards.folder, report.plan
    written = sum((folder / shard.file).stat().st_size for shard in shards.shards)
    headers = sum(len(shard.header) for shard in shards.shards)
    if abs(written - headers - plan.output_bytes) > SIZE_TOLERANCE * plan.output_bytes:
        raise ErnieQuantError(
            f"{folder} holds {written} bytes, but {plan.output_bytes} were planned; "
            "use --restart, and report this"
        )
    if len(shards.shards) > 1:
        write_json(folder / INDEX_FILE, index_of(shards.shards))
    write_companions(checkpoint.folder, folder)
    write_json(folder / REPORT_FILE, report.to_dict())
    # The config comes last: without it nothing takes the folder for a finished checkpoint.
    write_json(folder / CONFIG_FILE, output.config())


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Run every product on one thread: their rounding depends on how many share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
