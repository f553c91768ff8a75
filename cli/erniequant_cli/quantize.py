"""`erniequant quantize`: make a quantised copy of a checkpoint."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from erniequant.formats.rows import NATIVE, ROWS
from erniequant_cli.errors import DEGRADED, INTERRUPTED, complain
from erniequant_cli.options import Device, JsonFile, Quiet, deliver


class Bits(str, Enum):
    """Bits per expert weight; strings, because Typer offers no choice of integers."""

    two, three, four = "2", "3", "4"


class Effort(str, Enum):
    fast, standard, max = "fast", "standard", "max"


Format = Enum("Format", {name.replace("-", "_"): name for name in ROWS}, type=str)  # type: ignore[misc]
_NATIVE = Format(NATIVE)


class KOrder(str, Enum):
    plain, mma64 = "plain", "mma64"


class Tune(str, Enum):
    none, layer, model = "none", "layer", "model"


class Sensitivity(str, Enum):
    activation, gradient = "activation", "gradient"


class Engine(str, Enum):
    local, ray = "local", "ray"


class Search(str, Enum):
    cpu, cuda = "cpu", "cuda"


class ChatTemplate(str, Enum):
    apply, none = "apply", "none"


def quantize(
    src: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face id.")],
    dst: Annotated[str, typer.Argument(help="New folder to write.")],
    bits: Annotated[Bits, typer.Option(help="Bits per expert weight.")],
    format: Annotated[
        Format,
        typer.Option(
            help="Format of the result: our own, or the one that FastDeploy serves (2 bits)."
        ),
    ] = _NATIVE,
    code: Annotated[
        str | None,
        typer.Option(
            metavar="cc2|cc2s|cc3|cc4",
            help="native: one of the codes with so many bits. cc2s has 4 % less error than cc2 and "
            "costs a GPU twice the decoding; at 2 bits --effort max takes it by itself.",
        ),
    ] = None,
    k_order: Annotated[
        KOrder | None,
        typer.Option(
            help="fastdeploy-wint2: order of inputs; default mma64. FastDeploy before July 2025 "
            "reads plain."
        ),
    ] = None,
    w4_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="fastdeploy-wint2: number of first layers with 4-bit experts; default one in 13.",
        ),
    ] = None,
    calib: Annotated[
        str,
        typer.Option(
            metavar="builtin|FILE.txt|FILE.jsonl|hf:NAME[:SPLIT[:COLUMN]]",
            help="Text to calibrate on; also FILE.json, .csv, .parquet, and compressed (.gz). "
            "Records may be chats and may name images.",
        ),
    ] = "builtin",
    calib_samples: Annotated[int, typer.Option(min=1, help="Number of calibration windows.")] = 128,
    calib_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    chat_template: Annotated[
        ChatTemplate,
        typer.Option(help="apply renders chats with the model's template, none joins their texts."),
    ] = ChatTemplate.apply,
    no_calib: Annotated[
        bool, typer.Option("--no-calib", help="Quantise without calibration.")
    ] = False,
    effort: Annotated[
        Effort,
        typer.Option(
            help="Search effort: more gives better weights of the same size and takes longer."
        ),
    ] = Effort.standard,
    tune: Annotated[
        Tune,
        typer.Option(
            help="none: leave what is not packed as it is; layer: train it layer by layer, until "
            "the original's outputs are met best; model: then norms, routers and scales end to "
            "end as well, with the packed model in memory (best at 2 bits)."
        ),
    ] = Tune.none,
    sensitivity: Annotated[
        Sensitivity,
        typer.Option(
            help="activation: errors count by what they do to a layer's output; gradient: by what "
            "they do to the model's, from a backward pass of the original."
        ),
    ] = Sensitivity.activation,
    search: Annotated[
        Search,
        typer.Option(
            help="Where codes are searched. A GPU finds the same codes; --dry-run predicts the "
            "time of the CPU."
        ),
    ] = Search.cpu,
    max_tp: Annotated[
        int,
        typer.Option(min=1, help="Largest tensor-parallel degree that the files must split into."),
    ] = 2,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the rotation signs and samples.")] = 0,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory limit, such as 16GB; by default most of the free memory.",
        ),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder that keeps an unfinished run; inside DST by default."
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--restart",
            help="Continue an unfinished run, which must exist, or discard it. By default, an "
            "unfinished run is continued if there is one.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    max_degraded: Annotated[
        int, typer.Option(min=0, help="Exit with 3 if more expert matrices than this are degraded.")
    ] = 0,
    engine: Annotated[
        Engine,
        typer.Option(
            help="local: experts are quantised on this machine's cores; ray: on those of a Ray "
            "cluster, to the same bytes (pip install 'erniequant\\[ray]')."
        ),
    ] = Engine.local,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="ray: the cluster; by default that of RAY_ADDRESS, else one started here.",
        ),
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Make a quantised copy of an ERNIE 4.5 checkpoint.

    Only the routed experts are quantised (in a dense model, the MLPs; in a vision-language model,
    text and vision experts). All other tensors are copied verbatim; --tune trains some of them
    to make up for the loss. If the run is interrupted in any way, the same command continues it.

    [bold]Examples[/bold]

      erniequant quantize baidu/ERNIE-4.5-21B-A3B-PT ernie-2bit --bits 2

      erniequant quantize ./ernie ./ernie-4bit --bits 4 --calib chats.jsonl --chat-template apply

      erniequant quantize ./ernie ./ernie-wint2 --bits 2 --format fastdeploy-wint2

      erniequant quantize ./ernie-vl ./ernie-vl-2bit --bits 2 --calib pairs.jsonl

      erniequant quantize ./ernie ./ernie-3bit --bits 3 --max-memory 8GB --dry-run

      erniequant quantize ./ernie ./ernie-2bit --bits 2 --engine ray --ray-address 10.0.0.1:6379
    """
    from erniequant.quantization.pipeline import quantize as make
    from erniequant_cli.loading import hush
    from erniequant_cli.progress import make_progress
    from erniequant_cli.tables import print_quantization

    hush()
    try:
        report = make(
            src,
            dst,
            bits=int(bits.value),
            format=format.value,
            code=code,
            k_order=None if k_order is None else k_order.value,
            w4_layers=w4_layers,
            calib=calib,
            calib_samples=calib_samples,
            calib_length=calib_length,
            chat_template=chat_template.value,
            no_calib=no_calib,
            effort=effort.value,
            tune=tune.value,
            sensitivity=sensitivity.value,
            search=search.value,
            max_tp=max_tp,
            device=device,
            threads=threads,
            seed=seed,
            work_dir=work_dir,
            max_memory=max_memory,
            resume=resume,
            dry_run=dry_run,
            max_degraded=max_degraded,
            engine=engine.value,
            ray_address=ray_address,
            progress=make_progress(quiet),
        )
    except KeyboardInterrupt:
        complain("interrupted; repeat the command to continue where it stopped")
        raise typer.Exit(INTERRUPTED) from None
    if dry_run:
        return deliver(report.to_dict(), json, True, lambda: None)
    degraded = report.degraded > max_degraded
    try:
        deliver(
            report.to_dict(),
            json,
            quiet,
            lambda: print_quantization(report, dst),
            complete=f"{dst} is complete",
        )
    finally:
        if degraded:
            complain(
                f"{report.degraded} expert matrices are degraded, more than --max-degraded "
                f"{max_degraded}: see quantization_report.json in {dst}, and calibrate on more text"
            )
    if degraded:
        raise typer.Exit(DEGRADED)
