"""How close a quantised model is to its original: perplexity, divergence, and a plain baseline."""

from erniequant.evaluate.perplexity import PerplexityResult, ReferenceResult, perplexity
from erniequant.evaluate.rtn import RoundToNearest, round_to_nearest

__all__ = [
    "PerplexityResult",
    "ReferenceResult",
    "RoundToNearest",
    "perplexity",
    "round_to_nearest",
]
