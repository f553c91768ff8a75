"""Measure the exported model with stock transformers and complete MANIFEST.json.

    python calib_data/build/evaluate.py [--cache DIR] [--context 1024]

Held-out perplexity in bf16, the 3-gram figure on the same tokens, the expert load, and what plain
round-to-nearest of the routed experts costs at 2, 3 and 4 bits (asymmetric min-max over groups of
64 inputs of one output channel), with the paired z score of the token losses.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from export_model import config_dict
from fetch_texts import DATA, DEFAULT_CACHE
from ngram import perplexity as ngram_perplexity
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64


@torch.no_grad()
def token_losses(model: nn.Module, ids: Tensor, context: int) -> Tensor:
    """-ln p of every token but the first of each window; ids [N] -> float64 [about N]."""
    losses = []
    for window in ids.split(context):
        if len(window) > 1:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            losses.append(nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(losses).double()


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """[..., N, K] -> same shape and dtype, min-max grid per group of 64 inputs."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low).clamp(min=1e-12) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).flatten(-2).to(weight.dtype)


def expert_loads(model: Any, ids: Tensor, context: int) -> list[list[float]]:
    """Share of the routed slots of every expert, per sparse layer, on the given tokens."""
    sparse = model.model.layers[1:]
    counts = [torch.zeros(layer.mlp.gate.weight.shape[0]) for layer in sparse]

    def hook(position: int) -> Any:
        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            used = output[2].reshape(-1)
            counts[position] += torch.bincount(used, minlength=len(counts[position]))

        return count

    handles = [
        layer.mlp.gate.register_forward_hook(hook(position))
        for position, layer in enumerate(sparse)
    ]
    token_losses(model, ids, context)
    for handle in handles:
        handle.remove()
    return [[round(v, 4) for v in (c / c.sum()).tolist()] for c in counts]


def rtn_figures(model: Any, ids: Tensor, context: int, reference: Tensor) -> dict[str, Any]:
    """Perplexity ratio and paired z of RTN at 2, 3 and 4 bits; the model is left as it was."""
    experts = [layer.mlp.experts for layer in model.model.layers[1:]]
    weights = [(e, n, getattr(e, n)) for e in experts for n in ("gate_up_proj", "down_proj")]
    originals = [w.detach().clone() for _, _, w in weights]
    figures = {}
    for bits in (2, 3, 4):
        for (_, _, weight), original in zip(weights, originals, strict=True):
            weight.data.copy_(round_to_nearest(original, bits))
        change = token_losses(model, ids, context) - reference
        error = float(change.std()) / math.sqrt(len(change))
        figures[str(bits)] = {
            "ratio": round(math.exp(float(change.mean())), 4),
            "z": round(float(change.mean()) / error, 1),
        }
    for (_, _, weight), original in zip(weights, originals, strict=True):
        weight.data.copy_(original)
    return figures


def main() -> None:
    sys.path.insert(0, str(DATA.parent))
    from erniequant_data import heldout_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--model", type=Path, default=DATA / "tiny_model")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the figures into MANIFEST.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto", experts_implementation="eager"
    )
    ids = torch.tensor(tokenizer(heldout_text(), verbose=False)["input_ids"])
    losses = token_losses(model, ids, args.context)
    yardstick = ngram_perplexity(args.cache, tokenizer, ids.numpy(), args.context)
    perplexity = math.exp(float(losses.mean()))
    loads = expert_loads(model, ids, args.context)
    figures = {
        "heldout": {
            "context": args.context,
            "dtype": "bfloat16",
            "tokens": len(losses),
            "perplexity": round(perplexity, 4),
            "ratio_to_ngram": round(perplexity / yardstick["perplexity"], 4),
        },
        "ngram": yardstick,
        "rtn": {"group": GROUP, **rtn_figures(model, ids, args.context, losses)},
        "expert_load": loads,
        "expert_load_spread": [round(max(load) / max(min(load), 1e-4), 2) for load in loads],
    }
    print(json.dumps({k: v for k, v in figures.items() if k != "expert_load"}, indent=1))
    if args.write:
        training = json.loads((args.cache / "training.json").read_text("utf-8"))
        path = DATA / "MANIFEST.json"
        manifest = json.loads(path.read_text("utf-8"))
        manifest["model"] = {
            "licence": "Apache-2.0",
            "config": config_dict(len(tokenizer)),
            **training,
            **figures,
        }
        path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
