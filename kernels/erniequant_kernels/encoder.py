"""The encoder of `erniequant.codes.viterbi` with its rows searched on a GPU (``--search cuda``).

Every thread has its own stream, so experts that are quantised at the same time share the card.
"""

import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from erniequant.codes.spec import ConvolutionalCode
from erniequant.codes.steps import Float32
from erniequant.codes.viterbi import Encoder, encoder
from erniequant_kernels.viterbi import search_rows

_own = threading.local()


@lru_cache(maxsize=64)
def gpu_encoder(code: ConvolutionalCode, device: str = "cuda") -> Encoder:
    """The encoder of a code whose `Encoder.encode_rows` runs on a device, with arrays in main
    memory; `Encoder.encode` stays on the CPU."""
    return replace(encoder(code), search_rows=partial(_search_rows, code, torch.device(device)))


def _search_rows(
    code: ConvolutionalCode,
    device: torch.device,
    aims: Float32,
    feedback: Float32,
    scale: Float32,
    weights: Float32,
    tables: Float32,
    arranged: Float32,
    error: Float32,
    words: NDArray[np.uint32],
    labels: Float32,
) -> None:
    """Arguments after the device are those of the CPU's search; labels need no tables here."""
    with _stream(device):
        aim, own, size, importance, missed = (
            torch.from_numpy(array)[None].to(device, copy=True)
            for array in (aims, feedback, scale, weights, error)
        )
        packed, found = search_rows(aim, own, size, importance, missed, code)
        words.view(np.int32)[...] = packed[0].cpu().numpy()
        for array, tensor in ((aims, aim), (error, missed), (labels, found)):
            array[...] = tensor[0].cpu().numpy()


def _stream(device: torch.device) -> Any:
    """Work of this thread on a GPU, beside that of others."""
    if device.type != "cuda":
        return nullcontext()
    if not hasattr(_own, "stream"):
        _own.stream = torch.cuda.Stream(device)
    return torch.cuda.stream(_own.stream)
