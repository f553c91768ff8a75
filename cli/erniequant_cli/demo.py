"""`erniequant demo`: the whole product on an embedded tiny model."""

from pathlib import Path
from typing import Annotated

import typer

from erniequant_cli.options import JsonFile, Quiet, deliver


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the report; created if missing.")
    ] = Path("erniequant-demo"),
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the quantised models in DIR as well.")
    ] = False,
    all_formats: Annotated[
        bool, typer.Option("--all-formats", help="Also quantise to FastDeploy's WINT2.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Quantise the embedded tiny ERNIE 4.5 MoE at 4, 3 and 2 bits and compare with bf16.

    Takes minutes on two cores and needs neither network nor GPU. Writes report.json and report.md.

    [bold]Examples[/bold]

      erniequant demo

      erniequant demo --out my-report --keep-models

      erniequant demo --all-formats
    """
    from erniequant.demo import run_demo
    from erniequant_cli.loading import hush
    from erniequant_cli.progress import make_progress
    from erniequant_cli.tables import print_demo

    hush()
    report = run_demo(
        out,
        keep_models=keep_models,
        threads=threads,
        all_formats=all_formats,
        progress=make_progress(quiet),
    )
    deliver(
        report.to_dict(),
        json,
        quiet,
        lambda: print_demo(report, out),
        complete=f"the reports in {out} are complete",
    )
