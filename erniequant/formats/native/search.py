"""Where codes are searched: ``--search cpu`` or ``cuda``."""

import importlib.util
from collections.abc import Callable

import torch

from erniequant.codes import ConvolutionalCode
from erniequant.codes.viterbi import Encoder, encoder
from erniequant.errors import ErnieQuantError


def require_search(search: str) -> None:
    """Whether codes can be searched there.

    Raises:
        ErnieQuantError: there is no GPU, or no Triton.
    """
    if search == "cpu":
        return
    missing = None
    if not torch.cuda.is_available():
        missing = "torch finds no GPU here"
    elif importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    if missing:
        raise ErnieQuantError(f"--search {search}: {missing}; leave it out to search on the CPU")


def encoder_of(search: str) -> Callable[[ConvolutionalCode], Encoder]:
    """From a code to the encoder that searches there; a function that can be pickled."""
    if search == "cpu":
        return encoder
    from erniequant_kernels.encoder import gpu_encoder

    return gpu_encoder
