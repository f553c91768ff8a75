"""Which device a name means."""

import torch

from erniequant.errors import ErnieQuantError


def resolve_device(device: str) -> torch.device:
    """The device meant by "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ErnieQuantError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ErnieQuantError(
            f"no such device {device!r}; use auto, cpu, cuda or cuda:N"
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise ErnieQuantError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ErnieQuantError(f"device {device}: torch finds no GPU here; use --device cpu")
    return found
