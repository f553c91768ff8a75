"""The search of `erniequant bench tune`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erniequant_cli.options import deliver, show, write_json
from erniequant_cli.terminal import say

if TYPE_CHECKING:
    from erniequant_kernels.bench.tune import Found, Problem


def search(
    problems: "Sequence[Problem]", output: Path, seconds: float | None, json: Path | None,
    quiet: bool,
) -> None:  # fmt: skip
    """Search on the GPU at hand and write the tables to ``output``.

    Raises:
        ErnieQuantError: there is no GPU, or nothing could be searched.
    """
    import torch

    from erniequant.errors import ErnieQuantError

    if not torch.cuda.is_available():
        raise ErnieQuantError(
            "bench tune times tile sizes on an NVIDIA GPU and there is none; --dry-run counts "
            "them, and `erniequant bench static` counts machine code without a GPU"
        )
    from erniequant_kernels.bench import tune
    from erniequant_kernels.bench.cpu.machine import cores
    from erniequant_kernels.bench.machine import machine
    from erniequant_kernels.bench.timing import cuda_timer
    from erniequant_kernels.bench.tune_card import OnCard, all_tables, deadline
    from erniequant_kernels.tuning import settings_of, tuning_for

    device = torch.device("cuda")
    shipped = tuning_for(device)
    measure = OnCard(shipped, cuda_timer(), device, len(cores()))
    results: list[Found] = []
    for found in tune.search(problems, shipped, measure, deadline(seconds)):
        if not quiet:
            show(print_found, found)
        results.append(found)
        # What is known so far is there, should the search be ended.
        write_json(output, all_tables(_architecture(device), tune.with_rows(results, shipped)))
    table = tune.tuned(results, shipped, measure)
    write_json(output, all_tables(_architecture(device), table))
    result: dict[str, Any] = {
        "machine": machine(),
        "searched": [record(found) for found in results],
        "failures": dict(measure.failures.most_common()),
        "table": settings_of(table),
    }
    deliver(result, json, quiet, lambda: say(_summary(results, len(problems), output)))


def _architecture(device: Any) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def print_found(found: "Found") -> None:
    """One line per batch, as soon as it has been searched."""
    problem = found.problem
    start = f"{problem.shape:6}{problem.tokens:7}  {problem.bits} bits"
    if not found.seconds:
        say(f"{start}  none of {found.tried} candidates runs")
        return
    best = found.best
    tile = ", ".join(f"{name} {value}" for name, value in vars(best.tile).items())
    shipped = "" if found.shipped is None else f" (now {1e6 * found.shipped:.1f})"
    say(
        f"{start}{1e6 * found.seconds[best]:10.1f} us{shipped}: {best.kernel}, block_m "
        f"{best.block_m}, {tile}; {found.failed} of {found.tried} do not run"
    )


def record(found: "Found") -> dict[str, Any]:
    """The JSON form of what was found for a batch."""
    facts = asdict(found.problem) | {"tried": found.tried, "failed": found.failed}
    facts["shipped_microseconds"] = None if found.shipped is None else 1e6 * found.shipped
    if found.seconds:
        best = found.best
        facts |= {"microseconds": 1e6 * found.seconds[best], "best": asdict(best)}
    return facts


def _summary(results: "Sequence[Found]", wanted: int, output: Path) -> str:
    searched = f"{len(results)} of {wanted} batches searched"
    return f"{searched}; wrote {output}, which ERNIEQUANT_TUNING={output} makes the kernels use"
