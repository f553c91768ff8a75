"""Versions of vLLM: too old, known, or newer than anybody has tried. Imports nothing of vLLM."""

import re

OLDEST = (0, 32)
"""The first whose experts, routers and loaders have the form that the plugin extends."""
NEWEST_KNOWN = (0, 33)
"""The last that was tried (0.32) or read (0.33)."""


def said_about(version: str) -> tuple[str, bool]:
    """A line about a version, empty if there is nothing to say, and whether to register at all."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return f"vLLM has version {version!r}, which nobody has tried", True
    number = (int(found[1]), int(found[2]))
    if number < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"vLLM {version} is too old; quantised models need {oldest} or newer", False
    if number > NEWEST_KNOWN:
        newest = ".".join(map(str, NEWEST_KNOWN))
        return f"vLLM {version} is newer than {newest}, the last that was tried", True
    return "", True
