"""Which GPUs the kernels run on; experts on others are decoded by plain torch."""

import warnings
from functools import cache

import torch

from erniequant.errors import ErnieQuantWarning

LEAST_CAPABILITY = (8, 0)
"""The matrix instructions with bfloat16. Below, Triton compiles without an error: to products of
single numbers that spill registers."""


@cache
def runs_kernels(device: torch.device) -> bool:
    """Whether the kernels run on a CUDA device of torch.

    Warns once for a device (ErnieQuantWarning) if they do not.
    """
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        # Its capability is numbered like that of other NVIDIA cards.
        reason = "is no NVIDIA card"
    else:
        capability = torch.cuda.get_device_capability(device)
        if capability >= LEAST_CAPABILITY:
            return True
        reason = f"has compute capability {capability[0]}.{capability[1]}"
    warnings.warn(
        f"{name} {reason}, and the kernels need an NVIDIA card of 8.0 (Ampere) or newer: experts "
        "are decoded by torch, which is slow. Load the model with device='cpu', which has kernels, "
        "or with keep_decoded=True if the unquantised model fits into memory",
        ErnieQuantWarning,
        stacklevel=2,
    )
    return False
