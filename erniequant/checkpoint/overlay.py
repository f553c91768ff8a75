"""A checkpoint of which some tensors are replaced in memory."""

from collections.abc import Mapping
from typing import Any

import torch

from erniequant.checkpoint.reader import Checkpoint


class Overlay:
    """Reads like the checkpoint below it, except for the tensors that it has itself; shapes and
    dtypes are those of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]):
        self._checkpoint, self._tensors = checkpoint, tensors

    @property
    def headers(self) -> Mapping[str, Any]:
        """Headers of all tensors by name."""
        return self._checkpoint.headers

    def names(self) -> list[str]:
        """All tensor names."""
        return self._checkpoint.names()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        found = self._tensors.get(name)
        return self._checkpoint.tensor(name) if found is None else found
