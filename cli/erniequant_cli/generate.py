"""`erniequant generate`: a quick look at what a model says."""

from pathlib import Path
from typing import Annotated

import typer

from erniequant_cli.options import Device, Dtype, JsonFile, Quiet, deliver, is_stdout
from erniequant_cli.quantize import ChatTemplate
from erniequant_cli.terminal import say, say_piece, typed


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a quantised or a plain checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image to show it; repeat the option for more."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat_template: Annotated[
        ChatTemplate, typer.Option(help="apply wraps the prompt if the model has a template.")
    ] = ChatTemplate.apply,
    device: Device = "auto",
    dtype: Dtype = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt. The chat template is applied when the model has one.

    [bold]Examples[/bold]

      erniequant generate ernie-2bit "Why is the sky blue?"

      erniequant generate ernie-vl-2bit "What is this?" --image photo.jpg

      erniequant generate ernie-2bit "Once upon a time" --chat-template none --temperature 0.8
    """
    from erniequant.generation import generate
    from erniequant_cli.loading import load_model

    subject, tokenizer = load_model(model, device, dtype)
    said = 0  # characters

    def show(piece: str) -> None:
        nonlocal said
        said += len(piece)
        say_piece(piece)

    try:
        result = generate(
            subject,
            tokenizer,
            typed(prompt),
            images=image or (),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            chat_template=chat_template.value,
            # JSON on stdout comes first and as a whole.
            on_text=None if quiet or is_stdout(json) else show,
        )
    except BaseException:
        if said:
            say("")  # messages begin on a line of their own
        raise
    deliver(result.to_dict(), json, quiet, lambda: say(result.text[said:]))
