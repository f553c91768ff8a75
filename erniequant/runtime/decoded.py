"""Experts modules that decode weights as they are needed, and may keep them."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class DecodingExperts(nn.Module):
    """What experts modules of every format have in common.

    Attributes:
        keep_decoded: keep every expert's weights after first use. Faster, at the memory of the
            original model; set it back to False to free them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keep_decoded = False
        self._decoded: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    @property
    @abstractmethod
    def weights(self) -> int:
        """Number of weights that are packed."""

    @abstractmethod
    def decode(self, projection: str, expert: int) -> torch.Tensor:
        """Weights float32 ``[N, K]`` of one expert."""

    @property
    def keep_decoded(self) -> bool:
        """Whether decoded weights are kept."""
        return self._keep_decoded

    @keep_decoded.setter
    def keep_decoded(self, keep: bool) -> None:
        self._keep_decoded = keep
        self._decoded.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # Moving the module to another device must not leave weights behind.
        self._decoded.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._decoded.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def weight(self, projection: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Weights ``[N, K]`` of one expert, decoded in float32 and rounded to ``dtype``."""
        key = (projection, expert, dtype)
        found = self._decoded.get(key)
        if found is None:
            found = self.decode(projection, expert).to(dtype)
            if self._keep_decoded:
                self._decoded[key] = found
        return found
