"""Loading packed tensors into the modules of a rank, and counting what has come."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn
from vllm.config import get_current_vllm_config

from erniequant.errors import ErnieQuantError
from erniequant.packing.schema import TensorInfo
from erniequant.packing.sharding import Share, take_share


class PackedTensors:
    """The packed tensors of one module, which holds a rank's share of them as parameters.

    vLLM's own loaders would cut them as if they were matrices.
    """

    def __init__(
        self, module: nn.Module, infos: Mapping[str, TensorInfo], share: Share, where: str,
        prefix: str = "",
    ):  # fmt: skip
        """Registers the parameters.

        infos: shapes and dtypes of the share, by name after ``prefix``, which is that of the names
        in `erniequant.packing.sharding`.
        """
        self._module, self._share, self._where, self._prefix = module, share, where, prefix
        self._missing = set(infos)
        for name, (shape, dtype) in infos.items():
            # Zeros, as timing a model without weights leaves integers as they are.
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            module.register_parameter(name, parameter)

    def load(self, name: str, stored: torch.Tensor) -> None:
        """Copy the rank's share of a tensor as it is in the file.

        Raises:
            ErnieQuantError: another shape or dtype than the description gives.
        """
        parameter = self._module.get_parameter(name)
        share = take_share(self._prefix + name, stored, self._share)
        if share.shape != parameter.shape or share.dtype != parameter.dtype:
            raise ErnieQuantError(
                f"{self._where} {self._prefix}{name}: the share of rank {self._share.rank} is "
                f"{_described(share)}, expected {_described(parameter)}"
            )
        parameter.data.copy_(share)
        self._missing.discard(name)

    def load_all(self, weights: Iterable[tuple[str, torch.Tensor]], ignored: str) -> Iterator[str]:
        """`load` for the names of one module; yields those that it took. ``ignored``: the guard.

        Raises:
            ErnieQuantError: also for a name that the format does not have.
        """
        for name, stored in weights:
            if name == ignored:
                continue
            if name not in self._module._parameters:
                raise ErnieQuantError(
                    f"{self._where}: tensor {name} does not belong: its layer is quantised"
                )
            self.load(name, stored)
            yield name

    def require_complete(self) -> None:
        """Raise ErnieQuantError if a tensor has not come and weights were to be read at all."""
        if self._missing and get_current_vllm_config().load_config.load_format != "dummy":
            names = ", ".join(f"{self._prefix}{name}" for name in sorted(self._missing))
            raise ErnieQuantError(f"{self._where}: missing from the checkpoint: {names}")


def require_loaded(model: nn.Module, loaded: Collection[str], counted: Collection[str]) -> None:
    """Refuse a model with parameters that were not loaded: vLLM looks for them only where nothing
    is quantised.

    Args:
        loaded: names of parameters.
        counted: paths of modules whose parameters are checked elsewhere.

    Raises:
        ErnieQuantError: names the first such parameter.
    """
    prefixes = tuple(f"{path}." for path in counted)
    for name, _ in model.named_parameters():
        if name not in loaded and not name.startswith(prefixes):
            raise ErnieQuantError(f"the checkpoint has no weights for {name} of vLLM's model")


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
