"""Register with transformers and PEFT without making `import erniequant` wait for it.

Importing transformers takes seconds, and `erniequant --help` has one. Libraries that are loaded
already are told at once, the rest as soon as they are imported.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_format() -> None:
    from erniequant.integrations.transformers.plugin import register

    register()


def _register_vision_model() -> None:
    """Let AutoModelForCausalLM load vision-language models too, which transformers lists under
    AutoModelForImageTextToText alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from erniequant.models.registry import FAMILIES

    for family in FAMILIES.values():  # transformers lists text models already
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(family.model_type, family.model_class)


def _register_adapters() -> None:
    from erniequant.integrations.peft import register

    register()


TRIGGERS: dict[str, Callable[[], None]] = {
    # Defines `from_pretrained`.
    "transformers.modeling_utils": _register_format,
    "transformers.models.auto.modeling_auto": _register_vision_model,
    # PEFT 0.19 and later.
    "peft.utils.transformers_weight_conversion": _register_adapters,
}


class _LoadThenRegister(Loader):
    """Runs the real loader, then the registration."""

    def __init__(self, real: Loader, register: Callable[[], None]):
        self._real, self._register = real, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        self._register()


class _Watcher(MetaPathFinder):
    """Waits for some of the triggers and leaves once all are found."""

    def __init__(self, waiting: set[str]):
        self._waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._waiting:
            return None
        self._waiting.discard(name)
        if not self._waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader, TRIGGERS[name])
        return spec


def register_when_loaded() -> None:
    """Register now with libraries that are loaded, and with the rest as soon as they are. Safe to
    call again."""
    waiting = {name for name in TRIGGERS if name not in sys.modules}
    for name, register in TRIGGERS.items():
        if name not in waiting:
            register()
    if waiting and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(waiting))
