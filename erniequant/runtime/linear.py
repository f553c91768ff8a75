"""Linear layers that are quick with few tokens on a CPU.

A new token reads every weight of attention, shared experts and head once. torch's bfloat16 product
reads 8 to 10 GB/s a core for one token and waits for all threads after each; compiled code reads 14
and lets threads that are late do less.
"""

import torch
from torch import nn


class CpuLinear(nn.Linear):
    """A linear layer whose product with few bfloat16 tokens is compiled code; see `quicken`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`; outputs are rounded from float32 sums in another order."""
        weight = self.weight
        trained = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if self.bias is not None or trained or torch.compiler.is_compiling():
            return super().forward(input)
        from erniequant_kernels.cpu.dense import linear, takes_linear

        if type(input) is not torch.Tensor or not takes_linear(input, weight):
            return super().forward(input)
        return linear(input, weight)


def quicken(model: nn.Module) -> None:
    """Let the linear layers of a model on the CPU be `CpuLinear`; parameters and names stay.

    Layers that are a subclass of `nn.Linear` already, such as an adapter's, are left alone.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = CpuLinear
