"""Closeness of a quantised model to its original: perplexity, divergence, and a plain baseline."""

from erniequant.evaluate.images import ImageTextResult, image_perplexity
from erniequant.evaluate.perplexity import PerplexityResult, perplexity
from erniequant.evaluate.rtn import RoundToNearest, round_to_nearest
from erniequant.evaluate.scoring import ReferenceResult
from erniequant.evaluate.speed import SpeedComparison, SpeedResult, compare_speed, speed

__all__ = [
    "ImageTextResult",
    "PerplexityResult",
    "ReferenceResult",
    "RoundToNearest",
    "SpeedComparison",
    "SpeedResult",
    "compare_speed",
    "image_perplexity",
    "perplexity",
    "round_to_nearest",
    "speed",
]
