"""Measure the exported vision-language model with stock transformers and complete MANIFEST.json.

    python calib_data/build/evaluate_vl.py [--cache DIR] [--write]

On the held-out images: loss of the caption tokens (end included) with the right image, with that of
the next record, and after `<s>` alone. On the held-out text: perplexity. The tokens of every expert
of both sets, and what plain round-to-nearest of the text experts, of the vision experts and of both
costs (see `evaluate.py`); the last on more scenes, for the experts of so small a model do little.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from draw_images import HELDOUT, scene
from evaluate import GROUP, round_to_nearest, token_losses
from fetch_texts import DATA, DEFAULT_CACHE
from outliers import BLOCK, FACTOR, with_outliers
from PIL import Image
from records import names
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer
from vl_model import FOLDER, config_dict, image_processor, model_inputs

# Further held-out scenes, as the image processor would shrink them: first seed, how many, size.
SCENES = (HELDOUT + 1000, 100, (128, 96))
CONTEXT = 512  # tokens of a text window, as in the second half of training
SETS = {"text": ("text_moe",), "vision": ("vision_moe",), "both": ("text_moe", "vision_moe")}


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def opened(folder: Path, record: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(folder / name).convert("RGB") for name in names(record)]


def strangers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every record the next one with as many images."""
    matches = []
    for position, record in enumerate(records):
        others = records[position + 1 :] + records[:position]
        matches.append(next(r for r in others if len(names(r)) == len(names(record))))
    return matches


@torch.no_grad()
def caption_losses(
    model: Any, tokenizer: Any, images: list[list[Image.Image]], texts: list[str]
) -> Tensor:
    """-ln p of every caption token and its end, float64; `images[b]` stand before `texts[b]`.

    Without images `<s>` stands there, so that the first token is predicted as well.
    """
    losses = []
    processor = image_processor()
    for own, text in zip(images, texts, strict=True):
        caption = tokenizer(text)["input_ids"]
        before = [] if own else [tokenizer.bos_token_id]
        inputs = model_inputs(tokenizer, processor, [own], [before + caption])
        logits = model(**inputs, use_cache=False).logits[0, -len(caption) - 2 : -1].float()
        targets = inputs["input_ids"][0, -len(caption) - 1 :]
        losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses).double()


class Loads:
    """Counts the tokens of every expert of every sparse layer while it is entered."""

    def __init__(self, model: Any) -> None:
        self.layers = model.model.language_model.layers[1:]
        self.counts: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Loads:
        self.handles = []
        for part in ("text_moe", "vision_moe"):
            gates = [getattr(layer.mlp, part).gate for layer in self.layers]
            self.counts[part] = [torch.zeros(g.num_experts, dtype=torch.long) for g in gates]
            for gate, count in zip(gates, self.counts[part], strict=True):

                def add(module: Any, inputs: Any, output: Any, count: Tensor = count) -> None:
                    count += torch.bincount(output[2].flatten(), minlength=len(count))

                self.handles.append(gate.register_forward_hook(add))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def figures(self, part: str) -> dict[str, Any]:
        counts = self.counts[part]
        return {
            "tokens": [c.tolist() for c in counts],
            "spread": [round(float(c.max() / c.min().clamp(min=1)), 2) for c in counts],
        }


def rtn_figures(model: Any, text: Any, captions: Any) -> dict[str, Any]:
    """Change of the mean loss of `text()` and of `captions()`, in nats, and its paired z."""
    layers = model.model.language_model.layers[1:]
    before = text(), captions()
    figures: dict[str, Any] = {}
    for name, parts in SETS.items():
        weights = [
            getattr(getattr(layer.mlp, part).experts, projection)
            for layer in layers
            for part in parts
            for projection in ("gate_up_proj", "down_proj")
        ]
        originals = [w.detach().clone() for w in weights]
        for bits in (2, 3, 4):
            for weight, original in zip(weights, originals, strict=True):
                weight.data.copy_(round_to_nearest(original, bits))
            entry = figures.setdefault(name, {}).setdefault(str(bits), {})
            for kind, run, reference in zip(
                ("text", "captions"), (text, captions), before, strict=True
            ):
                change = run() - reference
                error = float(change.std()) / math.sqrt(len(change))
                entry[kind] = {
                    "loss": round(float(change.mean()), 4),
                    "z": round(float(change.mean()) / max(error, 1e-12), 1),
                }
        for weight, original in zip(weights, originals, strict=True):
            weight.data.copy_(original)
    return figures


def without_vision_experts(model: Any, captions: Any) -> float:
    """Change of the mean loss of `captions()`, in nats, where the vision experts give nothing."""
    before = captions()
    weights = [
        layer.mlp.vision_moe.experts.down_proj for layer in model.model.language_model.layers[1:]
    ]
    originals = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.data.zero_()
    change = float((captions() - before).mean())
    for weight, original in zip(weights, originals, strict=True):
        weight.data.copy_(original)
    return change


def main() -> None:
    sys.path.insert(0, str(DATA.parent))
    from erniequant_data import heldout_images, heldout_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--windows", type=int, default=40, help="of text, for rounding")
    parser.add_argument("--write", action="store_true", help="put the figures into MANIFEST.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(
        args.model, dtype="auto", experts_implementation="eager"
    )
    records, folder = read_records(heldout_images()), heldout_images().parent
    texts = [record["text"] for record in records]
    right = [opened(folder, record) for record in records]
    wrong = [opened(folder, record) for record in strangers(records)]
    ids = torch.tensor(tokenizer(heldout_text(), verbose=False)["input_ids"])
    with Loads(model) as on_captions:
        losses = caption_losses(model, tokenizer, right, texts)
    with Loads(model) as on_text:
        text_losses = token_losses(model, ids, CONTEXT)
    every = max(1, len(ids) // CONTEXT // args.windows)
    sample = torch.cat(ids.split(CONTEXT)[:-1][::every])

    first, count, size = SCENES
    scenes = [scene(first + k, size) for k in range(count)]

    def captions() -> Tensor:
        return caption_losses(
            model, tokenizer, [[image] for image, _ in scenes], [text for _, text in scenes]
        )

    def text() -> Tensor:
        return token_losses(model, sample, CONTEXT)

    figures: dict[str, Any] = {
        "captions": {
            "records": len(records),
            "tokens": len(losses),
            "dtype": "bfloat16",
            "loss_right_image": round(float(losses.mean()), 4),
            "loss_wrong_image": round(
                float(caption_losses(model, tokenizer, wrong, texts).mean()), 4
            ),
            "loss_no_image": round(
                float(caption_losses(model, tokenizer, [[]] * len(texts), texts).mean()), 4
            ),
        },
        "text": {
            "context": CONTEXT,
            "tokens": len(text_losses),
            "perplexity": round(math.exp(float(text_losses.mean())), 4),
        },
        "loss_without_vision_experts": round(without_vision_experts(model, captions), 4),
        "rtn": {"group": GROUP, **rtn_figures(model, text, captions)},
        "outlier_channels": {"one_in": BLOCK, "factor": FACTOR},
        "expert_load": {
            "text_experts_on_text": on_text.figures("text_moe"),
            "text_experts_on_captions": on_captions.figures("text_moe"),
            "vision_experts_on_captions": on_captions.figures("vision_moe"),
        },
    }
    model.load_state_dict(with_outliers(model.state_dict(), 1 / FACTOR))
    figures["outlier_channels"]["largest_change_of_a_loss"] = float(
        (caption_losses(model, tokenizer, right, texts) - losses).abs().max()
    )
    figures["outlier_channels"]["rtn_without"] = rtn_figures(model, text, captions)
    print(json.dumps(figures, indent=1))
    if args.write:
        training = json.loads((args.cache / "vl_training.json").read_text("utf-8"))
        path = DATA / "MANIFEST.json"
        manifest = json.loads(path.read_text("utf-8"))
        manifest["vl_model"] = {
            "licence": "Apache-2.0",
            "config": config_dict(tokenizer),
            **training,
            **figures,
        }
        path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
