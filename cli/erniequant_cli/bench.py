"""`erniequant bench`: the cost of the kernels, in machine code anywhere, in time on a GPU."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from erniequant_cli.errors import FAILED, complain
from erniequant_cli.options import JsonFile, Quiet, show, writable, write_json


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 1,16,256")
    return numbers


def static(
    arch: Annotated[
        str, typer.Option(metavar="80,90", help="Compute capabilities to compile for.")
    ] = "80,90",
    check: Annotated[
        bool, typer.Option("--check", help="Fail on spills, or on costs above the recorded budget.")
    ] = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compile every kernel and count its machine code; needs no GPU, takes a minute.

    Shapes are those of ERNIE-4.5-21B-A3B, tile sizes those of the shipped tables. Cost is a lane's
    issue slots per decoded weight in the main loop: the largest of all instructions, twice the
    logic and shifts, and twice the multiplications.

    [bold]Examples[/bold]

      erniequant bench static

      erniequant bench static --arch 90 --check --json static.json
    """
    from erniequant_kernels import machine_code_budget as counting
    from erniequant_kernels.machine_code import ARCHITECTURES

    archs = _numbers(arch)
    unknown = sorted(set(archs) - set(ARCHITECTURES))
    if unknown:
        choices = ", ".join(map(str, ARCHITECTURES))
        raise typer.BadParameter(f"no tile sizes for sm_{unknown[0]}; choose from {choices}")
    costs: list[dict[str, Any]] = []
    for record in counting.records(archs):
        if not quiet:
            from erniequant_cli.tables import print_kernel_cost

            show(print_kernel_cost, record, not costs)
        costs.append(record)
    write_json(json, {"records": costs})
    problems = counting.check(costs, counting.budget()) if check else []
    for problem in problems:
        complain(problem)
    if problems:
        raise typer.Exit(FAILED)


def kernels(
    shape: Annotated[
        str,
        typer.Option(
            metavar="21b|300b|vl|tiny", help="Shapes of the layers to measure, comma-separated."
        ),
    ] = "21b",
    tokens: Annotated[
        str, typer.Option(metavar="N,…", help="Batch sizes in tokens.")
    ] = "1,4,16,64,256,1024",
    bits: Annotated[str, typer.Option(metavar="2,3,4", help="Bits per weight.")] = "2,3,4",
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.svg", callback=writable, help="Also draw the result (needs matplotlib)."
        ),
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Time a layer's experts on the GPU, packed and in bfloat16, and say which is faster.

    The rivals are torch's grouped product, transformers' implementations and our own kernels on
    bfloat16 weights. Times are medians of single calls with a cold cache, in CUDA graphs where
    possible. Weights are random, and tokens spread evenly over experts. Every result is checked.

    [bold]Examples[/bold]

      erniequant bench kernels

      erniequant bench kernels --shape 21b,vl --tokens 1,16,2048 --bits 2,4 --plot speed.svg
    """
    shapes = shape.split(",")
    widths = _numbers(bits)
    counts = _numbers(tokens)
    if not set(widths) <= {2, 3, 4}:
        raise typer.BadParameter(f"--bits {bits}: choose from 2, 3 and 4")

    import torch

    from erniequant.errors import ErnieQuantError
    from erniequant.paths import expanded
    from erniequant_kernels.bench.problem import SHAPES

    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        choices = ", ".join(SHAPES)
        raise typer.BadParameter(f"--shape {unknown[0]}: choose from {choices}")
    if not torch.cuda.is_available():
        raise ErnieQuantError(
            "bench kernels measures time on an NVIDIA GPU and there is none; "
            "`erniequant bench static` counts machine code without one"
        )
    from erniequant_cli.tables import print_bench_row, print_verdicts
    from erniequant_kernels.bench import run as bench
    from erniequant_kernels.bench.machine import machine
    from erniequant_kernels.bench.timing import copy_bandwidth, cuda_timer

    bandwidth = copy_bandwidth()
    facts = machine()
    rows: list[bench.Row] = []
    measured = bench.measure(shapes, counts, widths, torch.device("cuda"), cuda_timer, bandwidth)
    for row in measured:
        if not quiet:
            show(print_bench_row, row, not rows)
        rows.append(row)
    verdicts = bench.verdicts(rows)
    if not quiet:
        show(print_verdicts, verdicts, str(facts["card"]), bandwidth)
    result = {"machine": facts, "copy_gb_per_s": bandwidth / 1e9}
    result |= {"rows": [row.to_dict() for row in rows], "verdicts": [asdict(v) for v in verdicts]}
    write_json(json, result)
    if plot is not None:
        from erniequant_kernels.bench.plot import save_plot

        save_plot(rows, str(facts["card"]), expanded(plot))
    problems = bench.wrong(rows)
    for problem in problems:
        complain(problem)
    if problems:
        raise typer.Exit(FAILED)
