"""Loads a model for a command, without the chatter of the libraries underneath."""

from typing import Any

from erniequant.errors import ErnieQuantError


def load_model(
    folder: str, device: str, dtype: str | None, reference: str | None = None
) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer; `dtype` None keeps the checkpoint's own.

    reference: the original, for the K order of a FastDeploy checkpoint that does not record it.
    """
    from erniequant.formats.verbs import load

    hush()
    model, tokenizer = load(folder, device=device, dtype=dtype, reference=reference)
    if tokenizer is None:
        raise ErnieQuantError(f"{folder} has no tokenizer: copy the original's into it")
    return model, tokenizer


def hush() -> None:
    """Keep transformers' warnings and bars off the terminal; our own messages say what matters."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
