"""Adapters beside packed experts: PEFT is told that the experts take none.

PEFT rewrites targets of a mixture for the stock model, where experts are fused parameters: there,
``gate_proj``, ``up_proj`` and ``down_proj`` mean these alone. Packed experts have no such
parameters, so their names keep meaning modules: shared experts and dense layers.
"""

import functools
import logging
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
        experts = packed_experts(model)
        if experts:
            check_targets(peft_config, experts)
        else:
            stock(peft_config, model, *args, **kwargs)

    conversion.convert_peft_config_for_transformers = convert


def packed_experts(model: nn.Module) -> list[str]:
    """Paths of the packed modules of a model."""
    from erniequant.runtime.decoded import DecodingExperts

    return [name for name, m in model.named_modules() if isinstance(m, DecodingExperts)]


def check_targets(peft_config: Any, experts: list[str]) -> None:
    """Say once that experts are skipped, if the targets of a PEFT config cover them.

    Raises:
        ErnieQuantError: it asks for parameters of experts, which are not there.
    """
    parameters = [f"{path}.{name}" for path in experts for name in _PARAMETERS]
    for target in getattr(peft_config, "target_parameters", None) or ():
        if any(name == target or name.endswith(f".{target}") for name in parameters):
            raise ErnieQuantError(
                f"target_parameters has {target!r}, but the experts are packed and take no "
                "adapter; leave it out, and name modules in target_modules"
            )
    if _cover(peft_config, experts):
        _logger.warning(
            "packed experts take no adapter and stay as they are; adapters go to the other targets"
        )


def _cover(peft_config: Any, experts: list[str]) -> bool:
    """Whether the targets would cover experts if these were modules, as in the original."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(peft_config, "target_modules", None)
    if targets is None:
        return False
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        return True
    return any(
        check_target_module_exists(peft_config, f"{path}{number}.{matrix}")
        for path in experts
        for number in ("", ".0")
        for matrix in _MATRICES
    )
