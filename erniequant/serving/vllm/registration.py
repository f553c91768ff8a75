"""Everything that the plugin adds to vLLM, in one list."""

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from erniequant.models.vl_config import MODEL_CLASS
from erniequant.serving.vllm import (
    cpu_repairs,
    fastdeploy_config,
    quantization_config,
    vision_config,
)

# By name, so that a model is imported where it runs and not before.
_MODELS = {
    vision_config.ARCHITECTURE: "vision_model:ErnieQuantVLMoe",
    fastdeploy_config.ARCHITECTURE: "fastdeploy_model:ErnieQuantFastDeploy",
}


def register_all() -> None:
    """Register formats and models, and repair what vLLM gets wrong for ERNIE on CPUs."""
    quantization_config.register()
    vision_config.register()
    fastdeploy_config.register()
    for architecture, where in _MODELS.items():
        ModelRegistry.register_model(architecture, f"erniequant.serving.vllm.{where}")
    MODELS_CONFIG_MAP[vision_config.ARCHITECTURE] = MODELS_CONFIG_MAP[MODEL_CLASS]
    cpu_repairs.apply()
