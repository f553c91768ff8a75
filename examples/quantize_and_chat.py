"""Quantise a model, unless that is done already, and chat with it.

    python examples/quantize_and_chat.py baidu/ERNIE-4.5-21B-A3B-PT ernie-2bit

An empty line, or the end of the input, ends the chat. The model remembers all that was said.
"""

import argparse
import sys
from pathlib import Path

from transformers import TextStreamer

import erniequant


def quantize(source: str, folder: Path, bits: int, calib: str) -> None:
    # config.json is written last. Without it there is nothing yet, or an interrupted run, which
    # the same call continues.
    if (folder / "config.json").exists():
        return
    report = erniequant.quantize(source, folder, bits=bits, calib=calib)
    print(f"{report.plan.total_bits_per_weight:.2f} bits per weight, {report.seconds:.0f} s")


def chat(folder: Path, max_tokens: int) -> None:
    model, tokenizer = erniequant.load(folder)
    if getattr(tokenizer, "chat_template", None) is None:
        sys.exit(f"{folder} has no chat template; choose a model that was trained to chat")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while said := ask():
        messages.append({"role": "user", "content": said})
        batch = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**batch, max_new_tokens=max_tokens, streamer=streamer)
        answer = output[0, batch["input_ids"].shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})


def ask() -> str:
    """The next line, empty at the end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="folder or Hugging Face id of the original")
    parser.add_argument("folder", type=Path, help="folder of the quantised model")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--calib", default="builtin", help="texts or chats to calibrate on")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer")
    options = parser.parse_args()
    try:
        quantize(options.source, options.folder, options.bits, options.calib)
        chat(options.folder, options.max_tokens)
    except erniequant.ErnieQuantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
