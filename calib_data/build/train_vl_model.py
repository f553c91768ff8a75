"""Train the embedded ERNIE 4.5 VL MoE on drawn scenes and texts: one command, a fixed time budget.

    python calib_data/build/train_vl_model.py --minutes 26 [--cache DIR]

Every step takes one batch of image captions and one of text windows, each on a thread of its own;
optimisers, schedule and load steering are those of `train_model.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import draw_images
import torch
from fast_ops import Loss
from fetch_texts import DEFAULT_CACHE
from torch import Tensor, nn
from train_model import (
    ADAM_RATE,
    BIAS_UNTIL,
    MUON_RATE,
    ROUTER_RATE,
    LoadSteering,
    Muon,
    Progress,
    batches,
    fast_experts,
    rate_factor,
    streams,
)
from transformers import AutoModelForImageTextToText, Ernie4_5_VLMoeConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
    apply_rotary_pos_emb_vision,
)
from vl_model import (
    FOLDER,
    MERGE,
    PATCH,
    config_dict,
    export,
    image_processor,
    model_inputs,
    text_tokenizer,
)

SEED = 46
WINDOWS = ((0.0, 256), (0.5, 512))  # (from this fraction of the budget, text window length)
TEXT_TOKENS = 1024  # per step
# Width and height that the model's image processor makes of the shipped sizes, and cheaper ones.
SMALL = ((64, 64), (80, 64), (64, 80))
SIZES = ((96, 96), (128, 96), (96, 128), (128, 80), (80, 128), (112, 96), (96, 112), *SMALL)
# (from this fraction of the budget, sizes, sequences per step, most shapes in a scene): what a word
# looks like is learned where there is only one thing that it can mean.
SCENES = ((0.0, SMALL, 44, 1), (0.15, SMALL, 36, 3), (0.25, SIZES, 24, 3))
PAIRS = 0.15  # share of batches whose sequences have two images
CHUNK = 4  # batches sorted by length together, so that little padding is needed
# Steering fades out at this fraction: later than in the text model, there are fewer experts.
STEER_UNTIL = 0.6
# Captions are read from image tokens of the layers below the last, and it takes long until the
# model looks there. The image token at the centre of a shape therefore learns to name it as well,
# each of so many hints a random token of its name; without them the last vision experts would also
# decay.
HINTS, HINT_WEIGHT = 3, 0.5
# Text has by far the larger gradients; unweighted, they would decide where attention goes.
CAPTION_WEIGHT = 5.0
# The text embeddings start at 0.02; image embeddings, normalised, would drown everything else.
IMAGE_SCALE = 0.1
# Biases at the rate of the other vectors outgrow what differs from patch to patch within a hundred
# steps; every normalisation then removes the image, and the model never learns to look.
BIAS_SHARE = 0.1


def new_model(tokenizer: Any) -> Any:
    torch.manual_seed(SEED)
    config = Ernie4_5_VLMoeConfig(**config_dict(tokenizer))
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for moe in moes(model):
        moe.experts.forward = fast_experts.__get__(moe.experts)
    for layer in model.model.language_model.layers[1:]:
        layer.mlp.forward = fast_mixture.__get__(layer.mlp)
    for block in model.model.vision_tower.blocks:
        block.attn.forward = image_attention.__get__(block.attn)
    # Twice the default, or more, for the narrow matrices between pixels and text.
    for part in (model.model.vision_tower, model.model.resampler_model):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    nn.init.constant_(model.model.resampler_model.after_norm.weight, IMAGE_SCALE)
    centre(model, tokenizer)
    return model


@torch.no_grad()
def centre(model: Any, tokenizer: Any) -> None:
    """Biases that make what reaches every normalisation of the image part 0 on average.

    Most of an image is light background. Uncentred, what all patches have in common is many times
    larger than what tells them apart, and colours of shapes are not learned in a thousand steps.
    """
    batch = next(caption_batches(tokenizer, image_processor(), SMALL, 64, 3, draw_images.TRAINING))
    tower, resampler = model.model.vision_tower, model.model.resampler_model
    first, second = tower.blocks
    spatial, temporal = resampler.spatial_linear, resampler.temporal_linear
    for linear, reader in (
        (first.attn.proj, first.norm2), (first.mlp.fc2, second.norm1),
        (second.attn.proj, second.norm2), (second.mlp.fc2, tower.ln),
        (spatial.fc1, spatial.act_fn), (spatial.fc2, spatial.ln),
        (temporal.fc1, temporal.act_fn), (temporal.fc2, temporal.ln),
        (resampler.mlp, resampler.after_norm),
    ):  # fmt: skip
        seen: list[Tensor] = []
        handle = reader.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(*inputs))
        model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        handle.remove()
        linear.bias -= seen[0].mean(0)


def image_attention(
    module: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any
) -> Tensor:
    """Stands in for the vision tower's attention where all images are of one size: [N, 64] -> same.

    The stock loop over images calls a kernel whose backward pass is a third of a training step.
    """
    images = len(cu_seqlens) - 1
    qkv = module.qkv(hidden_states).view(len(hidden_states), 3, module.num_heads, -1)
    q, k, v = qkv.unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (t.unflatten(0, (images, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q * module.scaling @ k.mT).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(len(hidden_states), -1))


def fast_mixture(module: Any, x: Tensor, types: Tensor | None = None) -> tuple[Tensor, None]:
    """Stands in for the stock mixture, whose masks are as wide as `x` [B, T, H]."""
    flat = x.flatten(0, 1)
    if types is None:
        routed = module.text_moe(flat)[0]
    else:
        routed = torch.zeros_like(flat)
        for moe, mask in ((module.text_moe, types == 0), (module.vision_moe, types != 0)):
            rows = mask.flatten().nonzero()[:, 0]
            routed = routed.index_copy(0, rows, moe(flat[rows])[0].view(len(rows), -1))
    return routed.view_as(x) + module.shared_experts(x), None


def moes(model: Any) -> list[Any]:
    """The text and the vision mixture of every sparse layer, in this order."""
    sparse = model.model.language_model.layers[1:]
    return [moe for layer in sparse for moe in (layer.mlp.text_moe, layer.mlp.vision_moe)]


def caption_batches(
    tokenizer: Any,
    processor: Any,
    sizes: Sequence[tuple[int, int]],
    sequences: int,
    most: int,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """Batches of new scenes from `seed` on, all images of one size, captions of nearly one length.

    Scenes have at most `most` shapes. Half as many sequences where each has two images.
    """
    rng = random.Random(seed)
    while True:
        size = rng.choice(sizes)
        images_each = 2 if rng.random() < PAIRS else 1
        count = sequences // images_each
        drawn = []
        for _ in range(CHUNK * count):
            plans: list[draw_images.Scene] = []
            while len(plans) < images_each:
                plan = draw_images.plan(seed)
                seed += 1
                if len(plan.things) <= most:
                    plans.append(plan)
            language = plans[0].language
            texts = [draw_images.caption(plan, language) for plan in plans]
            text = texts[0] if images_each == 1 else draw_images.both(*texts, language)
            drawn.append((plans, text))
        tokens = tokenizer([text for _, text in drawn])["input_ids"]
        order = sorted(range(len(drawn)), key=lambda i: len(tokens[i]))
        parts = [order[k : k + count] for k in range(0, len(order), count)]
        rng.shuffle(parts)
        for part in parts:
            images = [[draw_images.draw(plan, *size) for plan in drawn[i][0]] for i in part]
            batch = model_inputs(tokenizer, processor, images, [tokens[i] for i in part])
            hints = [
                (row, *hint)
                for row, i in enumerate(part)
                for hint in named_places(tokenizer, drawn[i][0], size, rng)
            ]
            yield {**batch, "hints": torch.tensor(hints)}


def named_places(
    tokenizer: Any, plans: list[draw_images.Scene], size: tuple[int, int], rng: random.Random
) -> Iterator[tuple[int, int]]:
    """For the centre of every shape, its position in the sequence and the tokens of its English
    name."""
    side = PATCH * MERGE
    across, down = size[0] // side, size[1] // side
    for number, plan in enumerate(plans):
        start = number * (across * down + 2) + 1  # between the tokens around every image
        where = draw_images.CORNERS[plan.cell][0] if len(plan.things) == 1 else ""
        for thing in plan.things:
            name = f" {thing.size} {thing.colour} {thing.shape} {where}".rstrip()
            index = start + int(thing.y * down) * across + int(thing.x * across)
            for token in rng.choices(tokenizer(name)["input_ids"], k=HINTS):
                yield index, token


def caption_loss(model: Any, batch: dict[str, Tensor]) -> Any:
    """Mean loss of the caption tokens (end included), the loss trained on, and loss of the
    hints."""
    rows, places, names = batch.pop("hints").unbind(1)
    ids, vision = batch["input_ids"], batch["moe_mm_token_type_ids"].bool()
    # Every sequence of a batch has the same images in the same places: one row of positions.
    each = len(batch["image_grid_thw"]) // len(ids)
    positions, _ = model.model.get_rope_index(
        ids[:1], batch["mm_token_type_ids"][:1], batch["image_grid_thw"][:each]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        hidden = model.model(
            **batch, position_ids=positions.expand(-1, len(ids), -1), use_cache=False
        ).last_hidden_state
    ends = ids[:, 1:] == model.config.text_config.eos_token_id
    first = int(vision[0].nonzero().max())
    # The tokens after the last image are predicted, up to the end; padding follows it.
    wanted = (ends.flip(1).cumsum(1).flip(1) > 0) & (torch.arange(1, ids.shape[1]) > first)
    loss = Loss.apply(hidden[:, :-1][wanted], model.lm_head.weight, ids[:, 1:][wanted])
    hints = Loss.apply(hidden[rows, places], model.lm_head.weight, names)
    return loss, CAPTION_WEIGHT * (loss + HINT_WEIGHT * hints), hints


def text_loss(model: Any, windows: Tensor) -> Any:
    """Mean loss of the windows [B, n + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    loss = Loss.apply(hidden.flatten(0, 1), model.lm_head.weight, windows[:, 1:].flatten())
    return loss, loss


def is_matrix(name: str, p: nn.Parameter) -> bool:
    plain = ("embed_tokens", "gate.weight")
    return p.ndim >= 2 and p.requires_grad and not any(part in name for part in plain)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    tokenizer = text_tokenizer()
    model = new_model(tokenizer)
    data = {k: t for k, t in streams(args.cache, tokenizer).items() if len(t) > 1024}
    steering = LoadSteering([moe.gate for moe in moes(model)])
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [p for n, p in named.items() if is_matrix(n, p)]
    routers = [moe.gate.weight for moe in moes(model)]
    fixed = {id(p) for p in matrices + routers}
    biases = [p for n, p in named.items() if n.endswith(".bias")]
    fixed |= {id(p) for p in biases}
    plain = [p for p in named.values() if id(p) not in fixed]
    trained = matrices + plain + routers + biases
    muon = Muon(matrices, MUON_RATE, pool)
    adam = torch.optim.AdamW(
        [
            {"params": plain, "peak": ADAM_RATE},
            {"params": routers, "peak": ROUTER_RATE},
            {"params": biases, "peak": BIAS_SHARE * ADAM_RATE},
        ],
        ADAM_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    generator = torch.Generator().manual_seed(SEED)
    scenes = [
        caption_batches(tokenizer, image_processor(), *kind, draw_images.TRAINING + k * 10**7)
        for k, (_, *kind) in enumerate(SCENES)
    ]
    windows: dict[int, Iterator[Tensor]] = {
        n: batches(data, generator, n, TEXT_TOKENS) for _, n in WINDOWS
    }

    def of_captions(stage: int) -> Any:
        loss, total, hints = caption_loss(model, next(scenes[stage]))
        return (loss.item(), hints.item()), torch.autograd.grad(total, trained, allow_unused=True)

    def of_text(length: int) -> Any:
        loss, total = text_loss(model, next(windows[length]))
        return loss.item(), torch.autograd.grad(total, trained, allow_unused=True)

    progress, budget, started = Progress(), args.minutes * 60, time.monotonic()
    captions, exported, means = 0, 0.0, [0.0, 0.0, 0.0]
    while progress.seconds < budget and progress.step < args.max_steps:
        fraction = progress.seconds / budget
        length = [n for start, n in WINDOWS if fraction >= start][-1]
        stage = sum(fraction >= start for start, *_ in SCENES) - 1
        tasks = (pool.submit(of_captions, stage), pool.submit(of_text, length))
        ((caption, hint), grads), (text, more) = (task.result() for task in tasks)
        for p, one, other in zip(trained, grads, more, strict=True):
            p.grad = other if one is None else one if other is None else one + other
        factor = rate_factor(fraction, progress.step)
        muon.param_groups[0]["lr"] = MUON_RATE * factor
        for group in adam.param_groups:
            group["lr"] = group["peak"] * factor
        nn.utils.clip_grad_norm_(plain + routers + biases, 1.0)
        muon.update(spare_experts=progress.step % 2 != 0)
        adam.step()
        model.zero_grad(set_to_none=True)
        steering.update(fraction * BIAS_UNTIL / STEER_UNTIL)
        progress.step += 1
        progress.tokens += TEXT_TOKENS
        captions += SCENES[stage][2]  # fewer where they have two images
        progress.seconds = time.monotonic() - started
        means = [means[0] + caption, means[1] + text, means[2] + hint]
        if progress.step % args.log_every == 0:
            entry = {
                "step": progress.step,
                "seconds": round(progress.seconds),
                "caption_loss": round(means[0] / args.log_every, 4),
                "hint_loss": round(means[2] / args.log_every, 4),
                "text_loss": round(means[1] / args.log_every, 4),
                "load_spread": round(steering.spread(), 1),
            }
            means = [0.0, 0.0, 0.0]
            progress.curve.append(entry)
            print(json.dumps(entry), flush=True)
        if progress.seconds - exported > args.export_every:
            exported = progress.seconds
            export(model.state_dict(), tokenizer, args.out)
    torch.save(model.state_dict(), args.cache / "vl_model.pt")
    export(model.state_dict(), tokenizer, args.out)
    facts = {"seed": SEED, "steps": progress.step, "images_from_seed": draw_images.TRAINING,
             "captions_seen": captions, "text_tokens": progress.tokens,
             "wall_seconds": round(progress.seconds), "machine": "2 CPU threads",
             "loss_curve": progress.curve}  # fmt: skip
    (args.cache / "vl_training.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--minutes", type=float, default=26)
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--export-every", type=float, default=300, help="seconds")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
