"""`erniequant serve`: a model behind OpenAI's API, by vLLM or by transformers' own server."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from erniequant_cli.errors import FAILED, complain
from erniequant_cli.options import JsonFile, Quiet, deliver
from erniequant_cli.terminal import note, say
from erniequant_cli.threads import wait_as_given

if TYPE_CHECKING:
    from erniequant.serving.plan import ServePlan


class Engine(str, Enum):
    """Who serves."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


def serve(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a quantised or a plain checkpoint, or a Hugging Face id."),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- ARGUMENTS]", help="Go to the server as they are, and win over options."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    tp: Annotated[
        int, typer.Option(min=1, help="Ranks of tensor parallelism: GPUs, or groups of processors.")
    ] = 1,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Clients have to send it. The variable VLLM_API_KEY does the same."
        ),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="auto takes vLLM where it is installed, else transformers.")
    ] = Engine.auto,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, start nothing.")] = (
        False
    ),
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model through OpenAI's API (chat, completions, streaming).

    Runs vLLM's server with erniequant's plugin, or without vLLM the one of transformers, once it is
    known that nothing stands in the way: files, versions, memory, ranks, port.

    [bold]Examples[/bold]

      erniequant serve ernie-2bit

      erniequant serve ernie-2bit --tp 2 --port 8080 -- --max-model-len 16384

      erniequant serve ernie-2bit --engine transformers --dry-run
    """
    from erniequant.serving.installed import VLLM
    from erniequant.serving.plan import plan_server
    from erniequant.serving.served_model import fetch
    from erniequant.serving.settings import ServeSettings

    passed = tuple(arguments or ())
    if passed and not passed[0].startswith("-"):
        raise typer.BadParameter(
            f"unexpected argument {passed[0]!r}; arguments of the server follow --"
        )
    plan = plan_server(ServeSettings(model, host, port, tp, api_key, engine.value, passed))
    deliver(plan.to_dict(), json, quiet, lambda: _draw(plan))
    for line in plan.problems:
        complain(line)
    if plan.problems:
        raise typer.Exit(FAILED)
    if not dry_run:
        fetch(plan.model)
        if plan.engine == VLLM:
            wait_as_given()
        plan.command.run()


def _draw(plan: "ServePlan") -> None:
    from erniequant.serving.memory import gigabytes

    rows = {
        "server": f"{plan.title}, at {plan.url}",
        "model": f"{plan.model.name}: {plan.model.architecture.description}, "
        f"{plan.model.description}",
    }
    if (memory := plan.memory) is not None:
        ranks = f" on each of {plan.settings.ranks} ranks" if plan.settings.ranks > 1 else ""
        cache = f", keys and values {gigabytes(memory.cache)}" if memory.cache else ""
        rows["memory"] = (
            f"weights {gigabytes(memory.weights)}{cache}{ranks}; {gigabytes(memory.needed)} of "
            f"{gigabytes(memory.available)} needed"
        )
    rows["command"] = plan.command.line()
    for name, text in rows.items():
        say(f"{name:8} {text}")
    for line in plan.notes:
        note(f"note: {line}")
