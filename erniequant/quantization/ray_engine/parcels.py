"""Values as an object store holds them: a small pickle beside the bytes of their tensors.

Ray maps numpy arrays into a worker without a copy; tensors it would pickle as one string, which
every task would copy.
"""

import io
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Parcel:
    """A value to be sent. ``buffers`` are the bytes of its tensors, uint8 ``[n]`` each."""

    pickled: bytes
    buffers: list[np.ndarray]


def pack(value: Any) -> Parcel:
    """A value that can be pickled, sharing the memory of its tensors where they lie on the CPU in
    one piece; a tensor that is there twice is sent once."""
    buffers: list[np.ndarray] = []

    def keep(buffer: pickle.PickleBuffer) -> None:
        buffers.append(np.frombuffer(buffer.raw(), np.uint8))

    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=keep).dump(value)
    return Parcel(file.getvalue(), buffers)


def unpack(parcel: Parcel) -> Any:
    """The value. Its tensors lie in the memory of the parcel, which others may share: they must not
    be written to."""
    return pickle.loads(parcel.pickled, buffers=parcel.buffers)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        flat = value.detach().cpu().contiguous().reshape(-1)
        arguments = flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape)
        return _tensor, arguments


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch has no tensors that are read only.
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(data).view(dtype).view(shape)
