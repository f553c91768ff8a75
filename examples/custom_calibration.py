"""Quantise with calibration data of your own making: chats as token batches from a DataLoader.

    python examples/custom_calibration.py baidu/ERNIE-4.5-21B-A3B-PT ernie-2bit chats.jsonl

A line of chats.jsonl is {"messages": [{"role": ..., "content": ...}, ...]}. `erniequant.quantize`
reads such files itself; this is for those who filter, mix or render their data otherwise.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import erniequant


def chats(path: Path, tokenizer, length: int) -> list[torch.Tensor]:
    """Token ids of every chat, at most ``length`` each."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    rendered = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in records]
    # The template has the special tokens already.
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return [torch.tensor(chat[:length]) for chat in ids]


def padded(batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One batch. Padding is masked: no expert is calibrated on it."""
    masks = [torch.ones_like(chat) for chat in batch]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(batch, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
    }


def quantize(source: str, folder: str, data: Path, bits: int, samples: int, length: int) -> None:
    sequences = chats(data, AutoTokenizer.from_pretrained(source), length)
    # An interrupted run goes on only with the data that it began with, so the order is fixed.
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(sequences, batch_size=8, shuffle=True, generator=order, collate_fn=padded)
    report = erniequant.quantize(source, folder, bits=bits, calib=loader, calib_samples=samples)
    used = report.calibration
    print(f"{used.windows} chats, {used.tokens} tokens; {report.degraded} matrices degraded")
    for layer, tokens in report.tokens_per_expert().items():
        print(f"layer {layer}: {min(tokens)} to {max(tokens)} tokens an expert")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="folder or Hugging Face id of the original")
    parser.add_argument("folder", help="folder of the quantised model")
    parser.add_argument("data", type=Path, help="JSONL of chats")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128, help="number of chats to use")
    parser.add_argument("--length", type=int, default=2048, help="most tokens of a chat")
    options = parser.parse_args()
    try:
        quantize(**vars(options))
    except erniequant.ErnieQuantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
