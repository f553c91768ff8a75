"""`erniequant bench`: what the kernels cost, in machine code anywhere, in time on a GPU."""

from typing import Annotated, Any

import typer

from erniequant_cli.errors import FAILED, complain
from erniequant_cli.options import JsonFile, Quiet, write_json


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
        bool, typer.Option("--check", help="Fail on spills or on more than the recorded budget.")
    ] = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compile every kernel and count its machine code; needs no GPU, takes a minute.

    Shapes are those of ERNIE-4.5-21B-A3B, tile sizes those of the shipped tables.
    Cost: issue slots of a lane per decoded weight in the main loop, the largest of
    all instructions, twice the logic and shifts, and twice the multiplications.

    [bold]Examples[/bold]

      erniequant bench static

      erniequant bench static --arch 90 --check --json static.json
    """
    from erniequant_kernels import static as counting
    from erniequant_kernels.machine_code import ARCHITECTURES

    archs = _numbers(arch)
    unknown = sorted(set(archs) - set(ARCHITECTURES))
    if unknown:
        known = ", ".join(map(str, ARCHITECTURES))
        raise typer.BadParameter(f"no tile sizes for sm_{unknown[0]}; choose from {known}")
    found: list[dict[str, Any]] = []
    for record in counting.records(archs):
        if not quiet:
            from erniequant_cli.tables import print_kernel_cost

            print_kernel_cost(record, first=not found)
        found.append(record)
    write_json(json, {"records": found})
    problems = counting.check(found, counting.budget()) if check else []
    for problem in problems:
        complain(problem)
    if problems:
        raise typer.Exit(FAILED)
