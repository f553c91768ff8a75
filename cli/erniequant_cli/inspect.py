"""`erniequant inspect`: the contents of a checkpoint."""

from typing import Annotated

import typer

from erniequant_cli.options import JsonFile, Quiet, deliver


def inspect(
    model: Annotated[str, typer.Argument(help="Folder of a quantised or a plain checkpoint.")],
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Show what a checkpoint holds: tensors, bits per weight, size, format version, codes, origin.

    Reads only headers, no weights.

    [bold]Examples[/bold]

      erniequant inspect ernie-2bit

      erniequant inspect ernie-2bit --json contents.json
    """
    from erniequant.formats.verbs import inspect as look
    from erniequant_cli.tables import print_inspection

    result = look(model)
    deliver(result.to_dict(), json, quiet, lambda: print_inspection(result))
