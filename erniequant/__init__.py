"""erniequant: quantises the experts of ERNIE 4.5 models to 4, 3 or 2 bits with convolutional codes.

Importing it registers the format with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads a quantised folder. Everything else is imported on
first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from erniequant.errors import ErnieQuantError, ErnieQuantWarning
from erniequant.integrations.registration import register_when_loaded as _register_when_loaded
from erniequant.version import __version__

if TYPE_CHECKING:
    from erniequant import ccq, evaluate
    from erniequant.formats.verbs import export, inspect, load, verify
    from erniequant.generation import generate
    from erniequant.quantization.pipeline import quantize
    from erniequant.runtime.warm_up import warm_up

_register_when_loaded()

_FUNCTIONS = {
    "quantize": "erniequant.quantization.pipeline",
    "generate": "erniequant.generation",
    "load": "erniequant.formats.verbs",
    "inspect": "erniequant.formats.verbs",
    "verify": "erniequant.formats.verbs",
    "export": "erniequant.formats.verbs",
    "warm_up": "erniequant.runtime.warm_up",
}

_MODULES = ("evaluate", "ccq")

__all__ = [
    "ErnieQuantError",
    "ErnieQuantWarning",
    "__version__",
    "ccq",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "quantize",
    "verify",
    "warm_up",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"erniequant.{name}")
    raise AttributeError(f"module 'erniequant' has no attribute {name!r}")
