"""LLVM modules to functions that release the interpreter lock; compiled code is kept on disk.

Modules are written as vector code for one machine, so no optimisation passes run: what is compiled
is what `vector_code` says.
"""

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from erniequant_kernels.cpu.machine import Machine

CACHE_VARIABLE = "ERNIEQUANT_CACHE"
"""Environment variable with the folder for compiled code; empty: keep nothing."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_engines: list[Any] = []  # own the code that functions point to
_lock = threading.Lock()
"""Two threads that meet the same new size compile it one after the other, the second from disk."""


def cache_folder() -> Path | None:
    """Where compiled code is kept, or None for nowhere."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder is not None:
        return Path(folder) if folder else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "erniequant" / "cpu"


def compile_function(module: ir.Module, name: str, machine: Machine) -> Callable[..., None]:
    """A function ``void name(int64 or pointer, ...)`` of a module, to be called with integers."""
    with _lock:
        parsed, target = _parsed(module, machine)
        engine = llvm.create_mcjit_compiler(parsed, target)
        file = _cache_file(module, machine)
        if file is not None:
            engine.set_object_cache(lambda _, code: _write(file, code), lambda _: _read(file))
        engine.finalize_object()
        _engines.append(engine)
        parameters = [ctypes.c_int64] * len(module.get_global(name).args)
        return ctypes.CFUNCTYPE(None, *parameters)(engine.get_function_address(name))


def assembly(module: ir.Module, machine: Machine) -> str:
    """The machine code of a module as text."""
    parsed, target = _parsed(module, machine)
    return str(target.emit_assembly(parsed))


def _parsed(module: ir.Module, machine: Machine) -> tuple[Any, Any]:
    """A module as LLVM has it, and the target to compile it for."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=machine.name, features=machine.features, opt=3
    )
    return parsed, target


def _cache_file(module: ir.Module, machine: Machine) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    version = f"{llvmlite.__version__} {llvm.llvm_version_info}"
    text = "\n".join(
        (version, llvm.get_default_triple(), machine.name, machine.features, str(module))
    )
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()}.o"


def _read(file: Path) -> bytes | None:
    """Compiled code whose digest is right: a file cut short by a full disk must not be run."""
    with suppress(OSError):
        content = file.read_bytes()
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() == digest:
            return code
    return None


def _write(file: Path, code: bytes) -> None:
    # Without a cache everything works, a little later.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(hashlib.sha256(code).digest() + code)
            os.replace(name, file)
        except OSError:
            os.unlink(name)
            raise
