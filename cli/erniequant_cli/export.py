"""`erniequant export`: a plain checkpoint from a quantised one."""

from enum import Enum
from typing import Annotated

import typer

from erniequant_cli.options import JsonFile, Quiet, write_json


class Target(str, Enum):
    bf16, fp32 = "bf16", "fp32"


def export(
    src: Annotated[str, typer.Argument(help="Folder of a quantised checkpoint.")],
    dst: Annotated[str, typer.Argument(help="New folder to write.")],
    to: Annotated[Target, typer.Option(help="Type of the expert weights written.")],
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Write a plain checkpoint that transformers loads without erniequant.

    [bold]Examples[/bold]

      erniequant export ernie-2bit ernie-2bit-plain --to bf16
    """
    from erniequant.exporting import export as write

    result = write(src, dst, to=to.value)
    write_json(json, result.to_dict())
    if not quiet:
        typer.echo(f"wrote {dst}")
