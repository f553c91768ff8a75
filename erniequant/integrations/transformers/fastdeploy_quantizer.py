"""Tells transformers about a model that was loaded from FastDeploy's layout: adapters may be
trained on it, and it cannot be saved in a layout that transformers would load."""

from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from erniequant.errors import ErnieQuantError


class FastDeployQuantizer(HfQuantizer):
    """Put on a model after loading; takes no part in it."""

    requires_calibration = True

    def __init__(self) -> None:
        super().__init__(QuantizationConfigMixin(quant_method="fastdeploy"), pre_quantized=True)

    def attach(self, model: Any) -> None:
        """Make ``model`` one that transformers knows to be quantised."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method

    def is_serializable(self) -> bool:
        """Asked by `save_pretrained`, whose files stock transformers would load with random
        experts.

        Raises:
            ErnieQuantError: always.
        """
        raise ErnieQuantError(
            "a model loaded from FastDeploy's layout cannot be saved by save_pretrained; copy its "
            "folder, or write a plain one by `erniequant export SRC DST --to bf16`"
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: gradients pass through packed experts, which have none."""
        return True
