"""How close a quantised model is to its original: perplexity, divergence, and a plain baseline."""

from erniequant.evaluate.perplexity import PerplexityResult, ReferenceResult, perplexity
from erniequant.evaluate.rtn import RoundToNearest, round_to_nearest
from erniequant.evaluate.speed import SpeedResult, speed

__all__ = [
    "PerplexityResult",
    "ReferenceResult",
    "RoundToNearest",
    "SpeedResult",
    "perplexity",
    "round_to_nearest",
    "speed",
]
