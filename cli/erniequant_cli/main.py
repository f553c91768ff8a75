"""The table of commands. Each lives in a file of its own and imports the library when it runs."""

import os

import typer

from erniequant_cli import (
    bench,
    chat,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    quantize,
    serve,
    verify,
)
from erniequant_cli.errors import INTERRUPTED, GuardedCommand, GuardedCommands
from erniequant_cli.terminal import occupy_closed_descriptors, say
from erniequant_cli.threads import wait_passively

wait_passively()

app = typer.Typer(
    name="erniequant",
    cls=GuardedCommands,
    help="Quantise ERNIE 4.5 mixture-of-experts models to 4, 3 and 2 bits per expert weight.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Measure a model's quality and speed.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
bench_app = typer.Typer(help="Measure the cost of the kernels.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

app.command("quantize", cls=GuardedCommand)(quantize.quantize)
eval_app.command("perplexity", cls=GuardedCommand)(evaluate.perplexity)
eval_app.command("speed", cls=GuardedCommand)(evaluate.speed)
bench_app.command("kernels", cls=GuardedCommand)(bench.kernels)
bench_app.command("static", cls=GuardedCommand)(bench.static)
bench_app.command("tune", cls=GuardedCommand)(bench.tune)
app.command("generate", cls=GuardedCommand)(generate.generate)
app.command("chat", cls=GuardedCommand)(chat.chat)
app.command("serve", cls=GuardedCommand)(serve.serve)
app.command("inspect", cls=GuardedCommand)(inspect.inspect)
app.command("verify", cls=GuardedCommand)(verify.verify)
app.command("export", cls=GuardedCommand)(export.export)
app.command("demo", cls=GuardedCommand)(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"erniequant {version('erniequant')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point of the `erniequant` command, and of `python -m erniequant`."""
    occupy_closed_descriptors()
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # A normal exit would wait for threads at work on an expert, up to minutes.
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
