"""Triton's interpreter with less to do: it patches `triton.language` once a launch, not at every
call of a helper inside a kernel, which took a third of its time."""

from collections.abc import Callable
from types import ModuleType
from typing import Any


def patch_once_a_launch() -> None:
    """Make it so for this process; calling it again does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    real: Callable[[Any], Any] = interpreter._patch_lang
    if hasattr(real, "patched"):
        return
    _scalars_count_loops(interpreter)
    patched: set[str] = set()

    def patch(function: Any) -> Any:
        known = (tl, tl.core)
        modules = [m for m in function.__globals__.values() if isinstance(m, ModuleType)]
        wanted = {module.__name__ for module in modules if module in known}
        if wanted and wanted <= patched:
            return interpreter._LangPatchScope()
        first = not patched
        scope = real(function)
        patched.update(wanted)
        if first:
            restore = scope.restore

            def end() -> None:
                restore()
                patched.clear()

            scope.restore = end
        return scope

    patch.patched = patched  # type: ignore[attr-defined]
    interpreter._patch_lang = patch


def _scalars_count_loops(interpreter: ModuleType) -> None:
    """Let a number that is known only at run time end a `range`: Triton 3.6 holds it as an array of
    one element, which numpy does not take for a number."""
    real: Callable[[Any, Any], None] = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        real(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch  # type: ignore[attr-defined]
