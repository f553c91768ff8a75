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


def fit_together(model: str, reference: str, device: str) -> bool:
    """Whether the weights of both fit the memory that the device has free; True if not known."""
    import torch

    from erniequant.checkpoint.reader import open_checkpoint
    from erniequant.system import available_memory, resolve_device

    target = resolve_device(device)
    free = torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else available_memory()
    try:
        needed = sum(open_checkpoint(source).total_bytes for source in (model, reference))
    except ErnieQuantError:
        return True  # loading says what is wrong
    return needed * HEADROOM <= free


HEADROOM = 1.15
"""Weights and what computing takes beside them, over weights."""


def hush() -> None:
    """Keep transformers' warnings and bars off the terminal; our own messages say what matters."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
