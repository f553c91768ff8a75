"""Train a LoRA adapter beside the packed experts of a quantised model.

    erniequant quantize baidu/ERNIE-4.5-21B-A3B-PT ernie-2bit --bits 2
    python examples/lora.py ernie-2bit my-text.txt my-adapter

Needs `pip install peft`. The experts stay packed and frozen; the adapter goes on attention, shared
experts and dense layers.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import erniequant  # noqa: F401  registers the format with transformers and PEFT


def windows(tokenizer, path: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of ``length`` tokens, each its own label."""
    with open(path, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(), add_special_tokens=False)["input_ids"])
    pieces = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def train(model: str, text: str, adapter: str, steps: int, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, device_map="auto")
    config = LoraConfig(target_modules="all-linear", r=16, lora_alpha=32, task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    peft_model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=adapter,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        # Activations of one layer instead of all; packed weights are decoded again on the way back.
        gradient_checkpointing=True,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    Trainer(peft_model, arguments, train_dataset=windows(tokenizer, text, length)).train()
    peft_model.save_pretrained(adapter)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a quantised checkpoint")
    parser.add_argument("text", help="UTF-8 text to train on")
    parser.add_argument("adapter", help="folder to write the adapter to")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    options = parser.parse_args()
    train(options.model, options.text, options.adapter, options.steps, options.length)
