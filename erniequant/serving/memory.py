"""Main memory and memory of cards that a server takes, against what there is."""

from dataclasses import dataclass
from typing import Any

GIB = 2**30
VLLM_PROCESS = 1.7 * GIB
"""Of a worker of vLLM on the CPU beside weights, keys and values: libraries, compiled code, and
the buffers of a step; measured with a model of a few MB."""

TRANSFORMERS_PROCESS = 0.8 * GIB
"""The same for transformers' server, estimated."""

CARD_SHARE = 0.92
"""The share of a card that vLLM takes if it is not told otherwise."""

_CONTEXTS = 4


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank takes and those that there are.

    Attributes:
        weights: of a rank.
        cache: for keys and values; None: the server decides.
        process: what a rank takes besides.
        available: of a card, or of the machine's main memory.
        ranks: that share `available`: all on the CPU, one on a card.
        place: "GPU" or "CPU".
    """

    weights: int
    cache: int | None
    process: int
    available: int
    ranks: int
    place: str

    @property
    def needed(self) -> int:
        """Bytes of `available` that cannot be done without."""
        return self.ranks * (self.weights + (self.cache or 0) + self.process)

    def problem(self, advice: str) -> str | None:
        """The line for a model that does not fit, None if it does."""
        if self.needed <= self.available:
            return None
        what = "the GPU" if self.place == "GPU" else "this machine"
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"the model needs {gigabytes(self.needed)}{ranks}, {gigabytes(self.weights)} of them "
            f"weights{' of a rank' if ranks else ''}, but {what} has {gigabytes(self.available)}; "
            f"{advice}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, in bytes."""
        return {
            "place": self.place,
            "weights_per_rank": self.weights,
            "cache_per_rank": self.cache,
            "needed": self.needed,
            "available": self.available,
        }


def cache_gib(token_bytes: int, positions: int, left: float) -> int:
    """Size in GiB of the keys and values of a rank on the CPU.

    For four texts of full length if they fit half of what is left, but one GiB at least, which is
    the unit that vLLM takes. By itself vLLM would take nine tenths of the machine.

    Args:
        token_bytes: of one token's keys and values.
        positions: length of the longest text, in tokens.
        left: bytes that are free beside the weights.
    """
    wanted = -(-_CONTEXTS * positions * token_bytes // GIB)
    return max(1, min(wanted, int(left / 2 // GIB)))


def gigabytes(n_bytes: float) -> str:
    """A size for people: 7.4 GB, 12 MB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{max(n_bytes, 1e5) / 1e6:.1f} MB"
