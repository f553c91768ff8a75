"""Plugin for vLLM: quantised checkpoints are served packed, by the operators that transformers use.

Installing erniequant registers it (entry point `vllm.general_plugins`). vLLM runs `register` in
every process and stops at what it raises, whichever model was asked for: here nothing may.
"""

import logging
from collections.abc import Iterator

from erniequant.serving.installed import version_note, version_problem


def register() -> None:
    """Make the formats known to vLLM. Safe to call again; a vLLM that it does not fit is left
    alone, with warnings."""
    for line in _registered():
        logging.getLogger("vllm.erniequant").warning("erniequant: %s", line)


def _registered() -> Iterator[str]:
    """Register everything; yields warnings."""
    import vllm

    if (problem := version_problem(vllm.__version__)) is not None:
        yield problem
        return
    if (note := version_note(vllm.__version__)) is not None:
        yield note
    from erniequant.serving.vllm.registration import PARTS

    for name, part in PARTS.items():
        try:
            part()
        except Exception as error:  # an interface that has changed can fail in any way
            kind = type(error).__name__
            yield f"vLLM {vllm.__version__} does not take {name} ({kind}: {error})"
