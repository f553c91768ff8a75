"""Compare quantised models with their original: size, perplexity, divergence.

    python examples/evaluate_and_compare.py baidu/ERNIE-4.5-21B-A3B-PT ernie-4bit ernie-2bit

Prints a Markdown table. The original and one quantised model are in memory at a time; both score
the same tokens, from the held-out text that comes with erniequant or from ``--text``.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import erniequant
from erniequant.evaluate import perplexity
from erniequant_data import heldout_text


def rows(original: str, folders: list[str], text: str | Path, tokens: int) -> Iterator[str]:
    yield "| model | MB | bits/weight, experts | perplexity | ratio to original | KL | top-1 |"
    yield "|---|---|---|---|---|---|---|"
    reference, tokenizer = erniequant.load(original)
    if tokenizer is None:
        sys.exit(f"{original} has no tokenizer")
    plain = perplexity(reference, tokenizer, text, tokens=tokens)
    yield f"| {original} | {size(original)} | {plain.perplexity:.3f} | 1 | 0 | 100.0 % |"
    for folder in folders:
        model, _ = erniequant.load(folder)
        result = perplexity(model, tokenizer, text, reference=reference, tokens=tokens)
        # The ratio is paired token by token, so its error is far below that of a perplexity.
        paired = result.reference
        yield (
            f"| {folder} | {size(folder)} | {result.perplexity:.3f} "
            f"| {paired.ratio:.4f} ± {paired.ratio_stderr:.4f} "
            f"| {paired.kl_mean:.4f} | {100 * paired.top1_agreement:.1f} % |"
        )


def size(source: str) -> str:
    """Megabytes of all tensors, and bits of a weight of the experts."""
    summary = erniequant.inspect(source)
    return f"{summary.total_bytes / 1e6:.1f} | {summary.expert_bits_per_weight:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original", help="folder or Hugging Face id")
    parser.add_argument("folders", nargs="+", help="folders of quantised models")
    parser.add_argument("--text", type=Path, help="UTF-8 text to score")
    parser.add_argument("--tokens", type=int, default=16_384, help="number of its tokens to score")
    options = parser.parse_args()
    text = options.text or heldout_text()
    try:
        for row in rows(options.original, options.folders, text, options.tokens):
            print(row, flush=True)
    except erniequant.ErnieQuantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
