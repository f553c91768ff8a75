"""`erniequant bench`: the cost of the kernels, in machine code and in time."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erniequant_cli.errors import FAILED, complain
from erniequant_cli.options import JsonFile, Quiet, deliver, show, writable, write_json
from erniequant_cli.terminal import say

if TYPE_CHECKING:
    from erniequant_kernels.bench.rows import Row


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
    logic and shifts, and twice the multiplications. "in all" adds prologue and epilogue, "L1" are
    the slots that pass while the level-1 pipe serves the loop's accesses; "sect." are sectors per
    request to global memory, "unco." requests of a turn that are not coalesced, "confl." clocks
    lost to bank conflicts. Accesses are counted by running the compiled code on this machine.

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
    for record in counting.records(archs, os.cpu_count() or 1):
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


CODES = ("2", "3", "4", "wint2")
"""What `--bits` takes."""

DEFAULTS = {
    "cuda": {"tokens": "1,4,16,64,256,1024", "bits": "2,3,4,wint2"},
    "cpu": {"tokens": "1,4,16,64,128,512", "bits": "2,3,4,wint2"},
}


def kernels(
    shape: Annotated[
        str,
        typer.Option(
            metavar="21b|300b|vl|tiny", help="Shapes of the layers to measure, comma-separated."
        ),
    ] = "21b",
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Batch sizes in tokens; by default 1,4,16,64, then 256,1024 on a GPU and 128,512 "
            "on the CPU.",
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(metavar="2,3,4,wint2", help="Codes to measure; by default all."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="cuda|cpu", help="Where to measure.")] = "cuda",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Cores to measure on, with --device cpu; by default all."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.svg", callback=writable, help="Also draw the result (needs matplotlib)."
        ),
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Time a layer's experts, packed and decoded, and say which is faster.

    On a GPU, the rivals are torch's grouped product, transformers' implementations and our own
    kernels on bfloat16 weights. Times are medians of single calls with a cold cache, in CUDA graphs
    where possible. Every method has one turn in each round; ratios are medians over the rounds,
    with quartiles.

    On the CPU, the rivals are torch's products with decoded weights in bfloat16 and float32, expert
    by expert, in rounds as well, with weights that no cache holds. The memory's limit is that of a
    triad in the same rounds. ERNIEQUANT_CPU=haswell measures the code for AVX2.

    Weights are random, and tokens spread evenly over experts. Every result is checked.

    [bold]Examples[/bold]

      erniequant bench kernels

      erniequant bench kernels --shape 21b,vl --tokens 1,16,2048 --bits 2,4 --plot speed.svg

      erniequant bench kernels --device cpu --threads 2 --tokens 1,512 --json cpu.json
    """
    if device not in DEFAULTS:
        raise typer.BadParameter(f"--device {device}: choose from cuda and cpu")
    if threads is not None and device != "cpu":
        raise typer.BadParameter("--threads is for --device cpu")
    shapes = shape.split(",")
    counts = _numbers(tokens or DEFAULTS[device]["tokens"])
    codes = (bits or DEFAULTS[device]["bits"]).split(",")
    if not set(codes) <= set(CODES):
        raise typer.BadParameter(f"--bits {bits}: choose from {', '.join(CODES)}")

    from erniequant_kernels.bench.problem import SHAPES

    _known(shapes, SHAPES)
    measure = _on_gpu if device == "cuda" else partial(_on_cpu, threads=threads)
    result, rows, name = measure(shapes, counts, codes, quiet)
    write_json(json, result)
    if plot is not None:
        from erniequant.paths import expanded
        from erniequant_kernels.bench.plot import save_plot

        save_plot(rows, name, expanded(plot))
    from erniequant_kernels.bench.rows import wrong

    problems = wrong(rows)
    for problem in problems:
        complain(problem)
    if problems:
        raise typer.Exit(FAILED)


def tune(
    shape: Annotated[
        str, typer.Option(metavar="21b,vl,300b", help="Shapes of the layers that have to be fast.")
    ] = "21b,vl",
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Batch sizes in tokens, in the order of the search; by default "
            "1,16,64,2048,4,256,1024.",
        ),
    ] = None,
    bits: Annotated[
        str, typer.Option(metavar="2,3,4", help="Bits per weight; the others keep their tiles.")
    ] = "2,4,3",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=writable, help="Where to write the tables; needed to search."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Begin with no other batch after so long; by default search all."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many candidates there are; needs no GPU.")
    ] = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Search the tile sizes that are fastest on the GPU at hand, and write the table.

    Each candidate is a whole layer, in a CUDA graph, with a cold cache. Those that spill
    registers, do not fit or are wrong are dropped; the best have another turn. Batches decide by
    their tokens per expert, so shapes with as many experts share what is found.

    The file has the tables of all cards, that of this one anew. ERNIEQUANT_TUNING=FILE makes the
    kernels use it.

    [bold]Examples[/bold]

      erniequant bench tune --output tuning.json

      erniequant bench tune --shape 300b --bits 2 --seconds 600 --output tuning.json

      erniequant bench tune --dry-run
    """
    shapes, widths = shape.split(","), _numbers(bits)
    if not set(widths) <= {2, 3, 4}:
        raise typer.BadParameter(f"--bits {bits}: choose from 2, 3, 4")
    if output is None and not dry_run:
        raise typer.BadParameter("--output FILE is needed, or --dry-run")
    from erniequant_kernels.bench.problem import SHAPES
    from erniequant_kernels.bench.tune import TOKENS, Problem, candidates

    _known(shapes, SHAPES)
    problems = [
        Problem(name, count, width)
        for count in (_numbers(tokens) if tokens else TOKENS) for name in shapes for width in widths
    ]  # fmt: skip
    if dry_run:
        numbers = {problem: len(candidates(problem.load)) for problem in problems}
        listed = [asdict(p) | {"candidates": number} for p, number in numbers.items()]
        total = sum(numbers.values())
        result: dict[str, Any] = {"problems": listed, "candidates": total}

        def draw() -> None:
            for found in listed:
                say("{shape:6}{tokens:7}  {bits} bits{candidates:6} candidates".format(**found))
            say(f"{total} candidates in all, less those that fail or are slow at fewer tokens")

        deliver(result, json, quiet, draw)
        return
    assert output is not None
    from erniequant_cli.tuning import search

    search(problems, output, seconds, json, quiet)


def _known(shapes: Sequence[str], known: Mapping[str, object]) -> None:
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise typer.BadParameter(f"--shape {unknown[0]}: choose from {', '.join(known)}")


_NOTHING = "nothing to measure: WINT2 does not fit these shapes"


def _on_gpu(
    shapes: list[str], tokens: list[int], codes: list[str], quiet: bool
) -> "tuple[dict[str, Any], Sequence[Row], str]":
    """The result for JSON, its rows, and the card's name."""
    import torch

    from erniequant.errors import ErnieQuantError

    if not torch.cuda.is_available():
        raise ErnieQuantError(
            "bench kernels measures time on an NVIDIA GPU and there is none; --device cpu measures "
            "the CPU, and `erniequant bench static` counts machine code without a GPU"
        )
    from erniequant_cli.tables import print_bench_row, print_ratios
    from erniequant_kernels.bench.machine import machine
    from erniequant_kernels.bench.rows import against_the_fastest
    from erniequant_kernels.bench.run import BatchResult, measure
    from erniequant_kernels.bench.timing import copy_bandwidth, cuda_timer

    timer = cuda_timer()
    bandwidth = copy_bandwidth(timer)
    facts = machine()
    results: list[BatchResult] = []
    for found in measure(shapes, tokens, codes, torch.device("cuda"), timer, bandwidth):
        if not quiet:
            for i, row in enumerate(found.rows):
                show(print_bench_row, row, not results and not i)
        results.append(found)
    if not results:
        raise ErnieQuantError(_NOTHING)
    rows = [row for found in results for row in found.rows]
    ratios = [ratio for found in results for ratio in found.ratios]
    card = str(facts["card"])
    if not quiet:
        fastest = against_the_fastest(rows, ratios)
        show(print_ratios, fastest, f"{card}, copies {bandwidth / 1e9:.0f} GB/s")
    result = {"machine": facts, "copy_gb_per_s": bandwidth / 1e9}
    result |= {"rows": [r.to_dict() for r in rows], "ratios": [r.to_dict() for r in ratios]}
    return result, rows, card


def _on_cpu(
    shapes: list[str], tokens: list[int], codes: list[str], quiet: bool, threads: int | None
) -> "tuple[dict[str, Any], Sequence[Row], str]":
    """The result for JSON, its rows, and the processor's name."""
    from statistics import median

    from erniequant.errors import ErnieQuantError
    from erniequant_cli.tables import print_bench_row, print_ratios
    from erniequant_kernels.bench.cpu.machine import cores, machine, pinned, wall_clock
    from erniequant_kernels.bench.cpu.run import BatchResult, measure

    there = len(cores())
    threads = threads or there
    if threads > there:
        raise ErnieQuantError(f"--threads {threads}: this process may use {there} cores")
    facts = machine(threads)
    results: list[BatchResult] = []
    with pinned(threads):
        for result in measure(shapes, tokens, codes, wall_clock):
            if not quiet:
                for i, row in enumerate(result.rows):
                    show(print_bench_row, row, not results and not i)
            results.append(result)
    if not results:
        raise ErnieQuantError(_NOTHING)
    limit = median(result.triad for result in results)
    ratios = [ratio for result in results for ratio in result.ratios]
    rows = [row for result in results for row in result.rows]
    name = f"{facts['processor']}, {threads} cores"
    if not quiet:
        show(print_ratios, ratios, f"{name}, triad {limit / 1e9:.1f} GB/s")
    return (
        {
            "machine": facts,
            "triad_gb_per_s": limit / 1e9,
            "rows": [row.to_dict() for row in rows],
            "ratios": [ratio.to_dict() for ratio in ratios],
        },
        rows,
        name,
    )
