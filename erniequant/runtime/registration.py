"""Register the transformers plugin without making `import erniequant` wait for transformers.

Importing transformers takes seconds, and `erniequant --help` has one. If transformers is loaded
already, registration is immediate; otherwise it happens at the moment the module that defines
`from_pretrained` has been imported.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRIGGER = "transformers.modeling_utils"


def _register() -> None:
    from erniequant.runtime.transformers_plugin import register

    register()


class _LoadThenRegister(Loader):
    """Runs the real loader, then the registration."""

    def __init__(self, real: Loader):
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _register()


class _Watcher(MetaPathFinder):
    """Waits for the trigger module and leaves once it is found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader)
        return spec


def register_when_loaded() -> None:
    """Register now if transformers is loaded, otherwise as soon as it is. Safe to call again."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
