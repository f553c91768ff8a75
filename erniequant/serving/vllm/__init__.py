"""Plugin for vLLM: quantised checkpoints are served packed, by the operators that transformers use.

Installing erniequant registers it (entry point `vllm.general_plugins`). vLLM runs `register` in
every process and stops at what it raises, whichever model was asked for: here nothing may.
"""

import logging

from erniequant.serving.installed import version_note, version_problem


def register() -> None:
    """Make the formats known to vLLM. Safe to call again; a vLLM that it does not fit is left
    alone, with a warning."""
    log = logging.getLogger("vllm.erniequant")
    try:
        import vllm

        problem, note = version_problem(vllm.__version__), version_note(vllm.__version__)
        if problem is None:
            from erniequant.serving.vllm.registration import register_all

            register_all()
    except Exception as error:
        # Any exception: an API that has changed can fail in any way.
        problem, note = (
            f"this vLLM does not take the plugin ({type(error).__name__}: {error})",
            None,
        )
    for line in filter(None, (problem, note)):
        log.warning("erniequant: %s", line)
