"""Plugin for vLLM: quantised checkpoints are served packed, by the operators that transformers use.

Installing erniequant registers it (entry point `vllm.general_plugins`). vLLM runs `register` in
every process and stops at what it raises, whichever model was asked for: here nothing may.
"""

from erniequant.serving.vllm.versions import said_about


def register() -> None:
    """Make the formats known to vLLM. Safe to call again; a vLLM that it does not fit is left
    alone, with a warning."""
    import logging

    log = logging.getLogger("vllm.erniequant")
    try:
        import vllm

        doubt, usable = said_about(vllm.__version__)
        if usable:
            from erniequant.serving.vllm.registration import register_all

            register_all()
    except Exception as error:
        # Any exception: an API that has changed can fail in any way.
        doubt = f"this vLLM does not take the plugin ({type(error).__name__}: {error})"
    if doubt:
        log.warning("erniequant: %s", doubt)
