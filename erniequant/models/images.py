"""How a model takes images: token ids, and sizes in pixels and patches."""

from dataclasses import dataclass
from typing import Any

VISION_MODEL_TYPE = "ernie4_5_vl_moe"


@dataclass(frozen=True)
class ImageSettings:
    """A square of ``merge`` x ``merge`` patches of ``patch`` x ``patch`` pixels is one token."""

    start_token: int
    token: int
    end_token: int
    patch: int
    merge: int
    channels: int


def image_settings(config: Any) -> ImageSettings | None:
    """Those of a transformers config; None for a model of text alone."""
    if config.model_type != VISION_MODEL_TYPE:
        return None
    vision = config.vision_config
    return ImageSettings(
        config.image_start_token_id,
        config.image_token_id,
        config.image_end_token_id,
        vision.patch_size,
        vision.spatial_merge_size,
        vision.in_channels,
    )
