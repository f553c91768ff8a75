"""`erniequant verify`: check that a quantised checkpoint is complete and sound."""

from typing import Annotated

import typer

from erniequant_cli.errors import FAILED, complain
from erniequant_cli.options import JsonFile, Quiet, deliver


def verify(
    model: Annotated[str, typer.Argument(help="Folder of a quantised checkpoint.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The original; also report the error of every tensor."),
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Verify checksums and completeness, and decode everything; exit with 1 if anything is wrong.

    [bold]Examples[/bold]

      erniequant verify ernie-2bit

      erniequant verify ernie-2bit --reference ./ernie --json errors.json
    """
    from erniequant.formats.verbs import verify as check
    from erniequant_cli.tables import print_verification

    result = check(model, reference=reference)
    deliver(result.to_dict(), json, quiet, lambda: print_verification(result))
    if not result.ok:
        count = f"{len(result.problems)} problem(s), first: {result.problems[0]}"
        complain(f"{model} is not sound, {count}; quantise or copy it again")
        raise typer.Exit(FAILED)
