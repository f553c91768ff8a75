"""Everything that the plugin adds to vLLM, in one list."""

from erniequant.serving.vllm import cpu_repairs, quantization_config


def register_all() -> None:
    """Register formats and models, and repair what vLLM gets wrong for ERNIE on CPUs."""
    quantization_config.register()
    cpu_repairs.apply()
