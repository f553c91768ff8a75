"""Measure variants of quantisation on the embedded tiny language model, in minutes.

    python -m benchmarks.tiny_models.ablation --work DIR [--bits 2 3 4] [--seeds 0 1 2]
        [--variants KEY=VALUE[,KEY=VALUE] ...]

A variant is a list of options of `erniequant.quantize`; that of an empty text has the defaults.
Calibration uses the texts of both languages that come with erniequant, evaluation their held-out
ones. One table: a row per run and, with several seeds, one per mean.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import erniequant_data
from benchmarks.real_model import runs, texts

LANGUAGES = ("en", "zh")
# As in the demo.
CONTEXT, TOKENS, SAMPLES = 512, 16_384, 64


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    runs.add_options(parser, LANGUAGES, SAMPLES)
    parser.add_argument(
        "--variants", nargs="*", type=runs.settings, default=[{}], metavar="KEY=VALUE,...",
        help="options of erniequant.quantize, one text per variant; '' has the defaults",
    )  # fmt: skip
    options = parser.parse_args()
    logging.disable_progress_bar()
    bench = prepare(options)
    print(runs.heading(options.texts), flush=True)
    for bits in options.bits:
        for variant in options.variants:
            runs.print_seeds(bench, bits, options, runs.merged([*options.set, variant]))


def prepare(options: argparse.Namespace) -> runs.Bench:
    """Evaluate the original."""
    work, folder = options.work, Path(erniequant_data.tiny_model_dir())
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = min(TOKENS, options.tokens or TOKENS)
    heldout = [
        texts.tokenized(name, erniequant_data.heldout_text(name), tokenizer, limit, CONTEXT)
        for name in options.texts
    ]
    calibration = torch.tensor(tokenizer(erniequant_data.calibration_text())["input_ids"])
    results = runs.measured(work, folder, heldout, calibration)
    return runs.Bench(work, folder, results, "builtin", options.samples, texts.CONTEXT)


if __name__ == "__main__":
    main()
