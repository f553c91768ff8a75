"""Measure quantisation on a real 135M-parameter language model cut into an ERNIE 4.5 MoE.

    pip install gguf
    python -m benchmarks.real_model.smollm2 --work DIR [--bits 2 3 4] [--seeds 0 1 2] [--sparse]
    python -m benchmarks.real_model.smollm2 --work DIR --evaluate FOLDER ...

The original is SmolLM2-135M-Instruct (Apache-2.0), made by `source.py` and `model.py`; ``--sparse``
makes two copies of every expert, and learned routers send each token to one of them (`routers.py`).
Calibration uses the English texts that come with erniequant, evaluation those of `texts.py`. The
program prints a row of a markdown table per quantised model and adds a line of JSON to
DIR/results.jsonl.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import erniequant_data
from benchmarks.real_model import evaluation, model, routers, runs, source, texts


def main() -> None:
    """Print one row of a markdown table per quantised model, and one per mean over seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    runs.add_options(parser, texts.TOKENS, samples=72)
    parser.set_defaults(texts=["en"])
    parser.add_argument("--sparse", action="store_true", help="eight experts, a token uses four")
    parser.add_argument("--no-noise", action="store_true", help="keep the weights' 4-bit grid")
    parser.add_argument(
        "--evaluate", type=Path, nargs="*", metavar="FOLDER",
        help="quantise nothing; evaluate these quantised or bf16 folders",
    )  # fmt: skip
    options = parser.parse_args()
    logging.disable_progress_bar()
    bench = prepare(options)
    print(runs.heading(options.texts), flush=True)
    if options.evaluate is not None:
        for folder in options.evaluate:
            runs.record(bench, {"model": folder.name, "folder": str(folder)}, folder)
        return
    more = runs.merged(options.set)
    for bits in options.bits:
        runs.print_seeds(bench, bits, options, more)


def prepare(options: argparse.Namespace) -> runs.Bench:
    """Make the original and evaluate it, as far as that was not done before."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    calibration = work / "calibration.txt"
    if not calibration.is_file():
        calibration.write_text(erniequant_data.calibration_text("en"), "utf-8")
    folder = make(work, options.sparse, not options.no_noise)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = [texts.read(name, work, tokenizer, options.tokens) for name in options.texts]
    results = runs.measured(work, folder, read, calibration_ids(tokenizer))
    return runs.Bench(work, folder, results, str(calibration), options.samples, texts.CONTEXT)


def make(work: Path, sparse: bool, noise: bool) -> Path:
    """The folder of the original, written if it is not there."""
    folder = work / (("sparse" if sparse else "dense") + ("-noise" if noise else ""))
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        layers = None
        if sparse:
            dense = make(work, False, noise)
            ids = calibration_ids(AutoTokenizer.from_pretrained(dense))
            layers = routers.learned(evaluation.load(dense), routers.spread(ids))
        model.write(source.load(work, noise), folder, layers)
    return folder


def calibration_ids(tokenizer: Any) -> torch.Tensor:
    """Token ids of the calibration text."""
    return torch.tensor(tokenizer(erniequant_data.calibration_text("en"))["input_ids"])


if __name__ == "__main__":
    main()
