"""From a checkpoint to a quantised checkpoint: plan, stream layer by layer, write, report.

Each MoE layer is quantised on the inputs that the quantised layers before it give, aiming at what
the original would have made of the same text. Only one layer's non-expert weights and a few experts
are in memory. Interrupted anywhere, the same call continues (`erniequant.resume`).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from erniequant.calibration.config import CalibrationConfig
from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.shards import ShardFiles
from erniequant.checkpoint.writer import MAX_SHARD_BYTES
from erniequant.errors import ErnieQuantError
from erniequant.formats.plan import QuantizeOptions
from erniequant.formats.rows import NATIVE
from erniequant.paths import expanded
from erniequant.progress import Progress, observed
from erniequant.quantization.calibration_input import calibration_report, read_windows
from erniequant.quantization.destination import complete, opened
from erniequant.quantization.engines import LOCAL, RAY, ray_engine
from erniequant.quantization.estimate import Estimate
from erniequant.quantization.executors import Executor, ThreadExecutor
from erniequant.quantization.job import CalibrationRequest, Job, plan_job
from erniequant.quantization.options import RunOptions
from erniequant.quantization.report import QuantizationReport
from erniequant.quantization.run import Run
from erniequant.quantization.run_identity import processor, run_identity
from erniequant.resume.workfolder import WorkFolder
from erniequant.system import peak_memory, peak_vram, return_freed_memory


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int,
    format: str = NATIVE,
    code: str | None = None,
    k_order: str | None = None,
    w4_layers: int | None = None,
    format_options: Mapping[str, Any] | None = None,
    calib: str | Path | Iterable[Any] = "builtin",
    calib_samples: int = 128,
    calib_length: int = 1024,
    chat_template: str = "apply",
    no_calib: bool = False,
    effort: str = "standard",
    tune: str = "none",
    sensitivity: str = "activation",
    search: str = "cpu",
    max_tp: int = 2,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    max_memory: str | int | None = None,
    resume: bool | None = None,
    dry_run: bool = False,
    max_degraded: int = 0,
    engine: str = LOCAL,
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Make a quantised copy of an ERNIE 4.5 checkpoint, text-only or vision-language.

    The output depends on the inputs, the options and the kind of processor, not on ``threads``,
    ``max_memory``, ``engine``, or whether the run was interrupted.

    Args:
        src: folder or Hugging Face id of the bf16 checkpoint.
        dst: new or empty folder, or that of an unfinished run with the same options.
        bits: 2, 3 or 4 bits per expert weight.
        format: ``native``, or ``fastdeploy-wint2`` (2 bits) for FastDeploy.
        code: code of the native format, of those with ``bits`` bits; by default cc2, cc3 or cc4,
            and at 2 bits with the effort ``max`` cc2s. See docs/codes.md.
        k_order: K order of WINT2, ``mma64`` (default) or ``plain``; see docs/fastdeploy.md.
        w4_layers: number of first MoE layers with 4-bit experts in FastDeploy's format; by default
            one in thirteen.
        format_options: options of a format that have no parameter of their own here.
        calib, calib_samples, calib_length, chat_template: see `CalibrationConfig`. ``calib`` may
            also be texts, chats (lists of messages), records, paths, token ids or batches that
            are ready for the model (see `erniequant.data.inputs.sequences_of`), as a list, a data
            set, a DataLoader or an iterator. All batches of a list are used; other things are
            read as far as needed, an iterator once, and by a dry run not at all.
        no_calib: use no text; every input direction counts the same.
        effort: ``fast``, ``standard`` or ``max``: how long the registers of the codes are.
        tune: ``none`` leaves what is not packed as it is. ``layer`` trains it in every layer once
            its experts are packed (attention, norms, shared experts, router, output scales of the
            experts), so that the layer gives the original's output; ``model`` also trains norms,
            routers and output scales of the whole model end to end, which needs it in memory,
            packed. Without calibration nothing is trained.
        sensitivity: ``activation`` judges errors by what they do to the output of a layer;
            ``gradient`` by one backward pass of the original over a part of the calibration data.
        search: ``cpu`` or ``cuda``: where the codes of the native format are searched; either finds
            the same.
        max_tp: tensor parallelism that the result must split into.
        device: where layers run (``auto``, ``cpu``, ``cuda``).
        threads: CPU threads; all cores by default.
        seed: seed of the rotation signs and of the choice of calibration windows.
        work_dir: folder for the journal and the hidden states of an unfinished run; inside ``dst``
            by default. It must hold nothing else.
        max_memory: limit of the run's memory in bytes, or text such as "16GB"; by default 85 % of
            the free memory.
        resume: True: only continue an unfinished run. False: discard it and start over. None:
            continue one if it is there.
        dry_run: plan, report, and write nothing.
        max_degraded: degraded expert matrices above which `QuantizationReport.is_degraded`.
        engine: ``local`` quantises experts on threads of this process, ``ray`` on a Ray cluster, to
            the same bytes on processors of the same kind; see docs/scale.md.
        ray_address: a node of the cluster, such as "10.0.0.1:6379"; by default the one that this
            process is connected to, else that of ``RAY_ADDRESS``, else one started here.
        progress: observer.

    Raises:
        ErnieQuantError: anything wrong with the source, the options or the destination.
    """
    own = {"code": code, "k_order": k_order, "w4_layers": w4_layers, **(format_options or {})}
    options = QuantizeOptions(
        bits, effort, max_tp, seed, format, {k: v for k, v in own.items() if v is not None},
        "none" if no_calib else tune,
        "activation" if no_calib else sensitivity,
        search,
    )  # fmt: skip
    config = CalibrationConfig("builtin", calib_samples, calib_length, chat_template, seed)
    request = None if no_calib else CalibrationRequest(calib, config)
    run = RunOptions(
        device, threads, work_dir, max_memory, resume, dry_run, max_degraded, engine, ray_address
    )
    return quantize_checkpoint(src, dst, options, request, run, observed(progress))


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    options: QuantizeOptions,
    request: CalibrationRequest | None,
    how: RunOptions,
    watch: Progress,
) -> QuantizationReport:
    """`quantize` with its options put together; without ``request`` there is no calibration."""
    job = plan_job(src, dst, options, request, how)
    watch.plan(job.text)
    if how.dry_run:
        return job.dry_report()
    windows = None
    if job.calibration is not None:
        windows = read_windows(job.checkpoint, job.model, job.calibration, watch)
    destination = expanded(dst)
    identity = run_identity(job.checkpoint, job.plan, _config(job), windows, job.device)
    if how.work_dir is not None:
        identity["the destination"] = str(destination.resolve())
    with (
        opened(destination, how.work_dir, how.resume) as work,
        ShardFiles(destination, job.output.shards(MAX_SHARD_BYTES)) as shards,
        _engine(job, how, watch) as (executor, watch),
        _single_threaded_products(),
        torch.no_grad(),
    ):
        return_freed_memory()
        work.begin(identity)
        run = Run(job, work, shards, watch, executor)
        _note_processor(work, watch)
        _execute(run, windows)
        report = _report(job, run, windows, how.max_degraded)
        complete(job.checkpoint, job.output, shards, report)
        work.remove()
    return report


@contextmanager
def _engine(job: Job, how: RunOptions, watch: Progress) -> Iterator[tuple[Executor, Progress]]:
    """The executor of a run, and its observer."""
    at_once = job.memory.experts_at_once
    if how.engine == RAY:
        on_gpu = "cuda" in (job.device.type, job.plan.options.search)
        with ray_engine(job.checkpoint, on_gpu, at_once, how.ray_address, watch) as found:
            yield found
    else:
        yield ThreadExecutor(at_once), watch


def _execute(run: Run, windows: CalibrationWindows | None) -> None:
    """The long part of a run."""
    sizes = run.model.sizes
    run.watch.start(len(sizes.moe_layers) * sizes.experts)
    try:
        run.shards.prepare()
        run.watch.advance(0, "checking the source")
        run.check_source()
        run.watch.advance(0, "copying")
        run.copy_tensors()
        run.quantize_layers(windows)
    except ErnieQuantError:
        if not run.has_experts:
            # Nothing that took long is lost, and the destination stays usable.
            run.shards.remove()
            run.work.clear()
        raise
    finally:
        run.watch.finish()


def _report(
    job: Job, run: Run, windows: CalibrationWindows | None, max_degraded: int
) -> QuantizationReport:
    journal = run.journal
    measured = Estimate(journal.seconds(), peak_memory(), peak_vram(job.device), run.disk_peak())
    return QuantizationReport(
        job.plan,
        job.text,
        calibration_report(_config(job), windows),
        run.matrices(),
        job.predicted,
        measured,
        {event["file"]: event["sha256"] for event in journal.of("shard")},
        sessions=len(journal.of("session")),
        layer_seconds=tuple(journal.seconds_of("layer")),
        left_behind=job.left_behind,
        max_degraded=max_degraded,
        tuned=run.tuned(),
    )


def _config(job: Job) -> CalibrationConfig | None:
    return None if job.calibration is None else job.calibration.config


def _note_processor(work: WorkFolder, watch: Progress) -> None:
    processors = {event["processor"] for event in work.journal.of("processor")}
    if processor() not in processors:
        if processors:
            others = ", ".join(sorted(processors))
            watch.message(
                f"this run was begun on another kind of processor ({others}); "
                "the result is sound, but not bit-identical to a result of either"
            )
        work.journal.append("processor", processor=processor())


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Run every product on one thread: their rounding depends on how many share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
