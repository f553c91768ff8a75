"""The yardstick of the embedded model: an interpolated Kneser-Ney 3-gram on the same tokens.

    python calib_data/build/ngram.py [--cache DIR]

Trained on exactly the token streams the model is trained on, scored on the held-out tokens the
model is scored on. One discount per order, chosen on the last 3 % of every training stream; the
counts behind the final figure include that part again.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fetch_texts import DATA, DEFAULT_CACHE, SOURCES

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
DEV_SHARE = 0.03


@dataclass(frozen=True)
class Table:
    """Counts of n-grams keyed by one integer, and per context their sum and number of kinds."""

    keys: Ints
    counts: Ints
    contexts: Ints
    totals: Ints
    kinds: Ints

    @staticmethod
    def build(keys: Ints, counts: Ints, vocabulary: int) -> Table:
        contexts, first, kinds = np.unique(
            keys // vocabulary, return_index=True, return_counts=True
        )
        return Table(keys, counts, contexts, np.add.reduceat(counts, first), kinds)

    def probability(self, keys: Ints, vocabulary: int, discount: float, lower: Floats) -> Floats:
        """Interpolated probability of every key, `lower` being the shorter context's."""
        count = _look_up(self.keys, self.counts, keys)
        context = keys // vocabulary
        total = _look_up(self.contexts, self.totals, context)
        kinds = _look_up(self.contexts, self.kinds, context)
        seen = np.maximum(total, 1)
        mixed = np.maximum(count - discount, 0.0) / seen + discount * kinds / seen * lower
        return np.where(total > 0, mixed, lower)


def _look_up(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


class KneserNey:
    """Counts of order 3, continuation counts of orders 2 and 1, over streams of token ids."""

    def __init__(self, streams: list[Ints], vocabulary: int) -> None:
        v = vocabulary
        keys, counts = np.unique(
            np.concatenate([(s[:-2] * v + s[1:-1]) * v + s[2:] for s in streams]),
            return_counts=True,
        )
        self.vocabulary = v
        self.three = Table.build(keys, counts, v)
        pairs, kinds = np.unique(keys % (v * v), return_counts=True)
        self.two = Table.build(pairs, kinds, v)
        ends, kinds = np.unique(pairs % v, return_counts=True)
        self.one = Table.build(ends, kinds, v)

    def log_probabilities(self, ids: Ints, discounts: tuple[float, float, float]) -> Floats:
        """ln p of ids[2:], each given the two tokens before it."""
        v = self.vocabulary
        last = ids[2:]
        p = np.full(len(last), 1.0 / v)
        p = self.one.probability(last, v, discounts[0], p)
        p = self.two.probability(ids[1:-1] * v + last, v, discounts[1], p)
        p = self.three.probability((ids[:-2] * v + ids[1:-1]) * v + last, v, discounts[2], p)
        return np.log(p)


def tune(model: KneserNey, dev: list[Ints]) -> tuple[float, float, float]:
    """Best discounts on the dev streams by coordinate search over a grid of 0.05."""
    best = [0.75, 0.75, 0.75]
    grid = [round(0.05 * k, 2) for k in range(1, 20)]

    def loss(discounts: list[float]) -> float:
        d = (discounts[0], discounts[1], discounts[2])
        return -sum(float(model.log_probabilities(s, d).sum()) for s in dev)

    for _ in range(2):
        for order in range(3):
            scores = [loss([*best[:order], d, *best[order + 1 :]]) for d in grid]
            best[order] = grid[int(np.argmin(scores))]
    return best[0], best[1], best[2]


def perplexity(cache: Path, tokenizer: Any, heldout: Ints, context: int) -> dict[str, Any]:
    """Held-out perplexity over the tokens that are not the first of a window of `context`."""
    files = [cache / "train" / f"{s.key}.txt" for s in SOURCES if s.train]
    streams = [
        np.array(tokenizer(p.read_text("utf-8"), verbose=False)["input_ids"], dtype=np.int64)
        for p in files
    ]
    cuts = [int(len(s) * (1 - DEV_SHARE)) for s in streams]
    fitted = KneserNey([s[:c] for s, c in zip(streams, cuts, strict=True)], len(tokenizer))
    discounts = tune(fitted, [s[c:] for s, c in zip(streams, cuts, strict=True)])
    model = KneserNey(streams, len(tokenizer))
    scores = model.log_probabilities(heldout, discounts)
    scored = np.arange(2, len(heldout)) % context != 0
    return {
        "method": "interpolated Kneser-Ney 3-gram",
        "discounts": discounts,
        "training_tokens": int(sum(map(len, streams))),
        "perplexity": round(math.exp(-float(scores[scored].mean())), 3),
    }


def main() -> None:
    import sys

    from transformers import AutoTokenizer

    sys.path.insert(0, str(DATA.parent))
    from erniequant_data import heldout_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_model")
    ids = np.array(tokenizer(heldout_text(), verbose=False)["input_ids"], dtype=np.int64)
    print(perplexity(args.cache, tokenizer, ids, args.context))


if __name__ == "__main__":
    main()
