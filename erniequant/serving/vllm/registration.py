"""Everything that the plugin adds to vLLM, part by part: one that a new vLLM does not take leaves
the others working."""

from collections.abc import Callable


def _text() -> None:
    from erniequant.serving.vllm import quantization_config

    quantization_config.register()


def _images() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from erniequant.models.vl_config import MODEL_CLASS
    from erniequant.serving.vllm import vision_config

    vision_config.register()
    # Models by name, so that they are imported where they run and not before.
    name = "erniequant.serving.vllm.vision_model:ErnieQuantVLMoe"
    ModelRegistry.register_model(vision_config.ARCHITECTURE, name)
    MODELS_CONFIG_MAP[vision_config.ARCHITECTURE] = MODELS_CONFIG_MAP[MODEL_CLASS]


def _wint2() -> None:
    from vllm.model_executor.models import ModelRegistry

    from erniequant.serving.vllm import fastdeploy_config

    fastdeploy_config.register()
    name = "erniequant.serving.vllm.fastdeploy_model:ErnieQuantFastDeploy"
    ModelRegistry.register_model(fastdeploy_config.ARCHITECTURE, name)


def _repairs() -> None:
    from erniequant.serving.vllm import cpu_repairs

    cpu_repairs.apply()


PARTS: dict[str, Callable[[], None]] = {
    "quantised models": _text,
    "vision-language models": _images,
    "FastDeploy's WINT2": _wint2,
    "repairs for ERNIE on CPUs": _repairs,
}
"""Each can be called again."""
