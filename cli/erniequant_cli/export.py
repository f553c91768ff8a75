"""`erniequant export`: a plain checkpoint from a quantised one."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from erniequant_cli.options import JsonFile, Quiet, deliver
from erniequant_cli.quantize import KOrder
from erniequant_cli.terminal import say

if TYPE_CHECKING:
    from erniequant.formats.results import ExportReport, WrittenShards


class Target(str, Enum):
    bf16, fp32, fastdeploy_wint2 = "bf16", "fp32", "fastdeploy-wint2"


def export(
    src: Annotated[str, typer.Argument(help="Folder of a quantised checkpoint.")],
    dst: Annotated[str, typer.Argument(help="New folder to write.")],
    to: Annotated[
        Target,
        typer.Option(
            help="Type of the weights to write; fastdeploy-wint2 cuts a checkpoint of that format."
        ),
    ],
    k_order: Annotated[
        KOrder | None,
        typer.Option(
            help="K order of a FastDeploy WINT2 checkpoint, if its files do not record it."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The original model, to detect the K order with."),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="fastdeploy-wint2: number of ranks to cut it for.")
    ] = 1,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Write a plain checkpoint that transformers loads without erniequant, or cut a FastDeploy
    checkpoint for several ranks.

    [bold]Examples[/bold]

      erniequant export ernie-2bit ernie-2bit-plain --to bf16

      erniequant export ernie-wint2 ernie-wint2-tp2 --to fastdeploy-wint2 --tensor-parallel 2
    """
    from erniequant.formats import verbs

    order = None if k_order is None else k_order.value
    result: ExportReport | WrittenShards
    if to is Target.fastdeploy_wint2:
        result = verbs.reshard(src, dst, to.value, tensor_parallel=tensor_parallel, k_order=order)
    else:
        result = verbs.export(src, dst, to=to.value, k_order=order, reference=reference)
    deliver(
        result.to_dict(), json, quiet, lambda: say(f"wrote {dst}"), complete=f"{dst} is complete"
    )
