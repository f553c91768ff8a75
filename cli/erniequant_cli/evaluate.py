"""`erniequant eval`: perplexity and the distance to a reference, and speed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from erniequant_cli.options import Device, Dtype, JsonFile, Quiet, deliver


def perplexity(
    model: Annotated[str, typer.Argument(help="Folder of a quantised or a plain checkpoint.")],
    reference: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also compare with this model, paired.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text, also compressed (.gz); default: the built-in held-out text.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME[:SPLIT[:COLUMN]]", help="Hugging Face data set to use instead."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="builtin|none|FILE.jsonl",
            help="Images with text; default: the built-in ones for models that take images, "
            "unless another text is given.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens per window; default: 2048, or the model's maximum if smaller."
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows; default: the context.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Use only this many tokens, from the start.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on a text, and the distance to a reference on the same tokens.

    By default windows do not overlap. The first token of a window is not scored, and no BOS is
    added. Compare figures only if context, stride and both hashes agree.

    [bold]Examples[/bold]

      erniequant eval perplexity ernie-2bit --reference ./ernie

      erniequant eval perplexity ernie-vl-2bit --reference ./ernie-vl --images photos.jsonl

      erniequant eval perplexity ernie-2bit --text book.txt --context 1024 --json result.json
    """
    from erniequant_cli.loading import load_model
    from erniequant_cli.progress import make_progress
    from erniequant_cli.tables import print_image_perplexity, print_perplexity

    if text is not None and dataset is not None:
        raise typer.BadParameter("give --text or --dataset, not both")

    from erniequant.evaluate import image_perplexity
    from erniequant.evaluate import perplexity as measure
    from erniequant.evaluate.texts import evaluation_text, require_text

    if text is not None:
        require_text(text)
    words = evaluation_text(dataset=dataset) if text is None else text
    subject, tokenizer = load_model(model, device, dtype, reference)
    other = None
    if reference is not None:
        other, other_tokenizer = load_model(reference, device, dtype)
        _require_same_tokens(tokenizer, other_tokenizer, words, tokens)
    result = measure(
        subject,
        tokenizer,
        words,
        reference=other,
        context=context,
        stride=stride,
        tokens=tokens,
        progress=make_progress(quiet),
    )
    records = _records(subject, images, by_default=text is None and dataset is None)
    given_images = None
    if records is not None:
        given_images = image_perplexity(
            subject,
            tokenizer,
            records,
            reference=other,
            progress=make_progress(quiet),
        )
    of_text = result.to_dict()

    def draw() -> None:
        print_perplexity(result)
        if given_images is not None:
            print_image_perplexity(given_images)

    everything = of_text if given_images is None else of_text | {"images": given_images.to_dict()}
    deliver(everything, json, quiet, draw)


def speed(
    model: Annotated[str, typer.Argument(help="Folder of a quantised or a plain checkpoint.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also measure this model, in turns; both stay in memory."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="Tokens to generate, one by one.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements, after one warm-up.")] = 3,
    device: Device = "auto",
    dtype: Dtype = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure tokens per second for a prompt and for new tokens, and memory, one sequence at a
    time.

    The share of the memory limit compares the weights that a new token reads with what the machine
    can read, measured in the same run.

    [bold]Examples[/bold]

      erniequant eval speed ernie-2bit --reference ./ernie

      erniequant eval speed ernie-2bit --prompt 2048 --new 128 --json speed.json
    """
    from functools import partial

    from erniequant.evaluate.speed import compare_speed
    from erniequant.evaluate.speed import speed as measure
    from erniequant_cli.loading import fit_together, load_model
    from erniequant_cli.tables import print_speed

    options = {"prompt_tokens": prompt, "new_tokens": new, "repetitions": repetitions}
    load = partial(_only_model, load_model, device=device, dtype=dtype)
    if reference is None:
        result = measure(load(model), **options)
        deliver(result.to_dict(), json, quiet, lambda: print_speed(result))
        return
    compared = compare_speed(
        lambda: load(model), lambda: load(reference), **options,
        interleave=fit_together(model, reference, device),
    )  # fmt: skip
    deliver(compared.to_dict(), json, quiet, lambda: print_speed(compared.model, compared))


def _only_model(load_model: Any, source: str, *, device: str, dtype: str | None) -> Any:
    return load_model(source, device, dtype)[0]


def _records(model: Any, asked: str | None, by_default: bool) -> str | None:
    """The images to evaluate on; None for none."""
    if asked == "none":
        return None
    if asked is None and by_default:
        from erniequant.models.registry import image_settings

        config = getattr(model, "config", None)
        return "builtin" if config is not None and image_settings(config) else None
    return asked


def _require_same_tokens(
    tokenizer: object, other: object, text: str | Path, tokens: int | None
) -> None:
    import torch

    from erniequant.errors import ErnieQuantError
    from erniequant.evaluate.perplexity import tokenize

    if not torch.equal(tokenize(tokenizer, text, tokens), tokenize(other, text, tokens)):
        raise ErnieQuantError(
            "the model and the reference cut the text into different tokens: "
            "compare a model with the one it was made from"
        )
