"""A linear layer that computes in float32 from weights that stay as they are stored."""

import torch
from torch import nn
from torch.nn.functional import linear

BLOCK = 1 << 22
"""Weights that are float32 at a time: 16 MB."""


class StoredLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` ``[N, K]``; parameters have the same names.

    A dense layer of the largest model has 3.4 GB in float32, half of that in bfloat16.
    """

    def __init__(self, shape: nn.Linear):
        """Parameters like those of ``shape``, on its device."""
        super().__init__()
        self.weight, self.bias = shape.weight, shape.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T + b`` for float32 ``[..., K]``, rows of the weight in blocks."""
        rows = max(BLOCK // self.weight.shape[1], 1)
        parts = []
        for start in range(0, self.weight.shape[0], rows):
            part = slice(start, start + rows)
            bias = None if self.bias is None else self.bias[part].float()
            parts.append(linear(x, self.weight[part].float(), bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def store_linears(module: nn.Module) -> None:
    """Replace every ``nn.Linear`` inside a module."""
    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            module.set_submodule(path, StoredLinear(child))
