"""Adapters beside packed experts: PEFT is told that the experts take none.

PEFT rewrites targets of a mixture for the stock model, where experts are fused parameters: there,
``gate_proj``, ``up_proj`` and ``down_proj`` mean these alone. Packed experts have no such
parameters, so their names keep meaning modules: shared experts and dense layers.
"""

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from erniequant.errors import ErnieQuantError

_MATRICES = ("gate_proj", "up_proj", "down_proj")
_PARAMETERS = ("gate_up_proj", "down_proj")
_ALL_LINEAR = "all-linear"

_logger = logging.getLogger("erniequant")


def register() -> None:
    """Make PEFT leave the targets of packed models alone; calling it again does nothing."""
    from peft.utils import transformers_weight_conversion as conversion

    stock = conversion.convert_peft_config_for_transformers
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def convert(peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if packed_experts(model):
            check_targets(peft_config, model)
        else:
            stock(peft_config, model, *args, **kwargs)

    conversion.convert_peft_config_for_transformers = convert


def packed_experts(model: nn.Module) -> list[str]:
    """Paths of the packed modules of a model."""
    from erniequant.runtime.decoding_module import DecodingExperts

    return [name for name, m in model.named_modules() if isinstance(m, DecodingExperts)]


def check_targets(peft_config: Any, model: nn.Module) -> None:
    """Say that experts are skipped, if the targets of a PEFT config cover them.

    Raises:
        ErnieQuantError: the config asks for parameters of experts, which are not there, or for
            nothing else.
    """
    experts = packed_experts(model)
    parameters = [f"{path}.{name}" for path in experts for name in _PARAMETERS]
    for target in getattr(peft_config, "target_parameters", None) or ():
        if any(name == target or name.endswith(f".{target}") for name in parameters):
            raise ErnieQuantError(
                f"target_parameters has {target!r}, but the experts are packed and take no "
                "adapter; leave it out, and name modules in target_modules"
            )
    targets = getattr(peft_config, "target_modules", None)
    if targets is None:
        return
    everything = isinstance(targets, str) and targets.lower() == _ALL_LINEAR
    if not everything and not any(_covered(peft_config, _as_modules(experts))):
        return
    linear = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    if not everything and not any(_covered(peft_config, linear)):
        raise ErnieQuantError(
            f"target_modules has nothing but packed {targets}, which take no adapter; add modules "
            "of the attention"
        )
    _logger.warning(
        "packed experts take no adapter and stay as they are; adapters go to the other targets"
    )


def _as_modules(experts: list[str]) -> Iterator[str]:
    """Names that matrices of experts have where they are modules: numbered, or of an MLP."""
    for path in experts:
        for number in ("", ".0"):
            yield from (f"{path}{number}.{matrix}" for matrix in _MATRICES)


def _covered(peft_config: Any, names: Iterable[str]) -> Iterator[bool]:
    """True if each of the names is among the targets."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return (bool(check_target_module_exists(peft_config, name)) for name in names)
