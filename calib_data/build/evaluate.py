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
from export_model import FINAL_SHARE, LOGIT_SCALE, config_dict
from fetch_texts import DATA, DEFAULT_CACHE
from ngram import perplexity as ngram_perplexity
from outliers import BLOCK, FACTOR, with_outliers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64
SAMPLE_EVERY = 4  # the test suite scores every fourth window only


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


def expert_loads(model: Any, ids: Tensor, context: int) -> list[Tensor]:
    """Routed slots per window and expert, for every sparse layer: [windows, E] each."""
    sparse = model.model.layers[1:]
    counts: list[list[Tensor]] = [[] for _ in sparse]

    def hook(position: int) -> Any:
        def count(module: Any, inputs: Any, output: Any) -> None:
            experts = module.weight.shape[0]
            counts[position].append(torch.bincount(output[2].reshape(-1), minlength=experts))

        return count

    handles = [
        layer.mlp.gate.register_forward_hook(hook(position))
        for position, layer in enumerate(sparse)
    ]
    token_losses(model, ids, context)
    for handle in handles:
        handle.remove()
    return [torch.stack(layer).float() for layer in counts]


def load_figures(loads: list[Tensor]) -> dict[str, Any]:
    """Largest over smallest load per layer: over the whole text, and in the median window."""
    return {
        "share": [[round(v, 4) for v in (c.sum(0) / c.sum()).tolist()] for c in loads],
        "spread": [round(float(c.sum(0).max() / c.sum(0).min()), 2) for c in loads],
        "median_window_spread": [
            round(float((c.amax(1) / c.amin(1).clamp(min=1)).median()), 2) for c in loads
        ],
    }


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
    windows = ids.split(args.context)[::SAMPLE_EVERY]
    sample = torch.cat([token_losses(model, window, args.context) for window in windows])
    yardstick = ngram_perplexity(args.cache, tokenizer, ids.numpy(), args.context)
    perplexity = math.exp(float(losses.mean()))
    loads = expert_loads(model, ids, args.context)
    figures: dict[str, Any] = {
        "heldout": {
            "context": args.context,
            "dtype": "bfloat16",
            "tokens": len(losses),
            "perplexity": round(perplexity, 4),
            "sample_every": SAMPLE_EVERY,
            "sample_perplexity": round(math.exp(float(sample.mean())), 4),
            "ratio_to_ngram": round(perplexity / yardstick["perplexity"], 4),
        },
        "ngram": yardstick,
        "rtn": {"group": GROUP, **rtn_figures(model, ids, args.context, losses)},
        "outlier_channels": {
            "one_in": BLOCK,
            "factor": FACTOR,
            "why": "an exact rescaling after training; see calib_data/build/outliers.py",
        },
        "expert_load": load_figures(loads),
    }
    model.load_state_dict(with_outliers(model.state_dict(), 1 / FACTOR))
    plain = token_losses(model, ids, args.context)
    figures["outlier_channels"]["largest_change_of_a_loss"] = float((plain - losses).abs().max())
    figures["outlier_channels"]["rtn_without"] = rtn_figures(model, ids, args.context, plain)
    print(json.dumps({k: v for k, v in figures.items() if k != "expert_load"}, indent=1))
    if args.write:
        training = json.loads((args.cache / "training.json").read_text("utf-8"))
        path = DATA / "MANIFEST.json"
        manifest = json.loads(path.read_text("utf-8"))
        manifest["model"] = {
            "licence": "Apache-2.0",
            "config": config_dict(len(tokenizer)),
            "finish": {"final_share": FINAL_SHARE, "logit_scale": LOGIT_SCALE},
            **training,
            **figures,
        }
        path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
