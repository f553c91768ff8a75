"""`erniequant inspect`: what is in a checkpoint."""

from typing import Annotated

import typer

from erniequant_cli.options import JsonFile, Quiet, deliver


def inspect(
    model: Annotated[str, typer.Argument(help="Folder of a quantised or a plain checkpoint.")],
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Say what a checkpoint holds: tensors, bits per weight, size, format version, codes, origin.

    Reads headers only, no weights.

    [bold]Examples[/bold]

      erniequant inspect ernie-2bit

      erniequant inspect ernie-2bit --json contents.json
    """
    from erniequant.formats.fastdeploy.recognise import is_fastdeploy_folder
    from erniequant_cli.tables import print_inspection

    if is_fastdeploy_folder(model):
        from erniequant.formats.fastdeploy.inspect import inspect_fastdeploy

        result = inspect_fastdeploy(model)
    else:
        from erniequant.formats.native.inspect import inspect as look

        result = look(model)
    deliver(result.to_dict(), json, quiet, lambda: print_inspection(result))
