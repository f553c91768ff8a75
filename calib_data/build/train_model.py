"""Train the embedded ERNIE 4.5 MoE: one command, a fixed wall-clock budget, any CPU.

    python calib_data/build/train_model.py --minutes 75 [--cache DIR] [--resume]

The learning rate follows the elapsed fraction of the budget and reaches zero at its end, so every
run ends annealed however fast the machine is. Matrices are trained with Muon (orthogonalised
momentum), the rest with Adam. Expert load is steered as in ERNIE 4.5, by the sign of the load error
added to the selection bias; the steering fades out early, so the load stays uneven.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from export_model import config_dict, export, finish
from fast_ops import Experts, Loss
from fetch_texts import DATA, DEFAULT_CACHE, SOURCES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_MoeConfig

SEED = 45
# (from this fraction of the budget, tokens per step): early on, more steps beat better gradients.
STEP_TOKENS = ((0.0, 2048), (0.2, 4096))
# (from this fraction of the budget, window length): short windows first, they are cheaper.
WINDOWS = ((0.0, 256), (0.35, 512), (0.8, 1024))
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 3e-3, 0.1
EXPERT_EVERY = 2  # steps between moves of the experts: their iteration is a third of the cost
# The routers learn more slowly than anything else: at the other rates the load collapses at once.
ROUTER_RATE = 3e-4
MIDDLE = 0.47  # the weights at this fraction are averaged into the result
HOLD = 0.35  # fraction of the budget at the full rate; linear to zero afterwards
BIAS_RATE, BIAS_UNTIL = 3e-3, 0.22
# Small sources are seen more often than their size, up to this power of it.
SAMPLING_POWER = 0.9


@dataclass
class Progress:
    """Progress of a run; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (matrices, or stacks)."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, pool: Executor) -> None:
        super().__init__(parameters, {"lr": rate})
        self.pool = pool

    def update(self, *, spare_experts: bool) -> None:
        """One step; `spare_experts` only gathers momentum for the stacks, the costly part."""
        for group in self.param_groups:
            changed = [p for p in group["params"] if p.grad is not None]
            rates = [0.0 if spare_experts and p.ndim == 3 else group["lr"] for p in changed]
            list(self.pool.map(self._one, changed, rates))

    @torch.no_grad()
    def _one(self, p: nn.Parameter, rate: float) -> None:
        assert p.grad is not None
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 0.05)
        if rate == 0.0:
            return
        update = p.grad.lerp(momentum, 0.95)
        # gate_up_proj holds two matrices per expert, one above the other.
        halves = 2 if p.ndim == 3 and p.shape[1] == 2 * p.shape[2] else 1
        pieces = [orthogonalise(u) for u in update.chunk(halves, dim=-2)]
        scale = rate * max(1.0, pieces[0].shape[-2] / pieces[0].shape[-1]) ** 0.5
        p.mul_(1 - rate * WEIGHT_DECAY).add_(torch.cat(pieces, -2), alpha=-scale)


def orthogonalise(update: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrix, approximately: quintic iteration in bfloat16."""
    x = update.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if transposed else x).float()


def fast_experts(module: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Stands in for the stock experts' forward: [T, H], [T, k], [T, k] -> [T, H]."""
    gate_up, down = module.gate_up_proj.bfloat16(), module.down_proj.bfloat16()
    result: Tensor = Experts.apply(x, index, weight, gate_up, down)
    return result


def new_model(vocabulary: int) -> Any:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(
        Ernie4_5_MoeConfig(**config_dict(vocabulary)), dtype=torch.float32
    )
    for layer in model.model.layers[1:]:
        layer.mlp.experts.forward = fast_experts.__get__(layer.mlp.experts)
    return model


def streams(cache: Path, tokenizer: Any) -> dict[str, Tensor]:
    """Token stream of every training source."""
    texts = {s.key: (cache / "train" / f"{s.key}.txt") for s in SOURCES if s.train}
    return {
        key: torch.tensor(tokenizer(path.read_text("utf-8"), verbose=False)["input_ids"])
        for key, path in texts.items()
    }


def batches(
    data: dict[str, Tensor], generator: torch.Generator, length: int, tokens: int
) -> Iterator[Tensor]:
    """Windows [tokens / length, length + 1] at random places of random sources."""
    keys = list(data)
    odds = torch.tensor([float(len(data[k])) ** SAMPLING_POWER for k in keys])
    while True:
        rows = []
        for choice in torch.multinomial(odds, tokens // length, True, generator=generator):
            stream = data[keys[int(choice)]]
            start = int(torch.randint(len(stream) - length - 1, (1,), generator=generator))
            row = stream[start : start + length + 1].clone()
            if float(torch.rand(1, generator=generator)) < 0.15:
                row[0] = 1  # <s>, so that a text may begin with it
            rows.append(row)
        yield torch.stack(rows)


def rate_factor(fraction: float, step: int) -> float:
    return min(1.0, (step + 1) / 40) * min(1.0, max(0.0, (1 - fraction) / (1 - HOLD)))


class LoadSteering:
    """Counts the tokens of every expert and moves the selection biases against the load error."""

    def __init__(self, gates: list[Any]) -> None:
        self.gates = gates
        self.counts = [torch.zeros(g.weight.shape[0]) for g in self.gates]
        self.fresh = [torch.zeros(g.weight.shape[0]) for g in self.gates]
        self.lock = threading.Lock()
        for position, gate in enumerate(self.gates):
            gate.register_forward_hook(self._count(position))

    def _count(self, position: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            experts = self.fresh[position].numel()
            load = torch.bincount(output[2].reshape(-1), minlength=experts)
            with self.lock:
                self.fresh[position] += load

        return hook

    def update(self, fraction: float) -> None:
        rate = BIAS_RATE * max(0.0, 1 - fraction / BIAS_UNTIL)
        for gate, fresh, count in zip(self.gates, self.fresh, self.counts, strict=True):
            gate.moe_statics.e_score_correction_bias += rate * (fresh.mean() - fresh).sign()
            count += fresh
            fresh.zero_()

    def spread(self) -> float:
        """Largest over smallest load, worst layer; resets the counts."""
        worst = max(float(c.max() / c.min().clamp(min=1)) for c in self.counts)
        for count in self.counts:
            count.zero_()
        return worst


def gradients(
    model: Any, trained: list[nn.Parameter], batch: Tensor, *, pieces: int
) -> tuple[float, tuple[Tensor, ...]]:
    """Loss of the windows [B, n + 1] over `pieces`, and its gradients; changes nothing else."""
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
    loss = Loss.apply(hidden.flatten(0, 1), model.lm_head.weight, batch[:, 1:].flatten())
    loss = loss / pieces
    return loss.item(), torch.autograd.grad(loss, trained)


def at(schedule: tuple[tuple[float, int], ...], fraction: float) -> int:
    """Value of the last entry that has begun."""
    return [value for start, value in schedule if fraction >= start][-1]


def train(args: argparse.Namespace) -> None:
    # One single-threaded worker per core: two-thread matrix products wait for each other and are
    # slower than one thread as soon as anything else runs on the machine.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_model")
    data = streams(args.cache, tokenizer)
    model = new_model(len(tokenizer))
    steering = LoadSteering([layer.mlp.gate for layer in model.model.layers[1:]])
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and _is_matrix(n)]
    others = [p for n, p in model.named_parameters() if p.requires_grad and not _is_matrix(n)]
    muon = Muon(matrices, MUON_RATE, pool)
    routers = [gate.weight for gate in steering.gates]
    plain = [p for p in others if all(p is not r for r in routers)]
    adam = torch.optim.AdamW(
        [{"params": plain, "peak": ADAM_RATE}, {"params": routers, "peak": ROUTER_RATE}],
        ADAM_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    trained = matrices + others
    progress = Progress()
    checkpoint = args.cache / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        progress = Progress(**saved["progress"])
    generator = torch.Generator().manual_seed(SEED + progress.step)
    budget, saved_at, started = args.minutes * 60, progress.seconds, time.monotonic()
    before, length, size = progress.seconds, 0, 0
    source: Iterator[Tensor] = iter(())
    mean_loss, mean_count = 0.0, 0
    middle_saved = progress.seconds >= MIDDLE * budget
    while progress.seconds < budget and progress.step < args.max_steps:
        fraction = progress.seconds / budget
        wanted, tokens = at(WINDOWS, fraction), at(STEP_TOKENS, fraction)
        if (wanted, tokens) != (length, size):
            length, size = wanted, tokens
            source = batches(data, generator, length, size)
        if fraction >= MIDDLE and not middle_saved:
            torch.save(model.state_dict(), args.cache / "middle.pt")
            middle_saved = True
        batch = next(source)
        pieces = batch.split(max(1, len(batch) // args.threads))
        work = partial(gradients, model, trained, pieces=len(pieces))
        results = list(pool.map(work, pieces))
        for p, *parts in zip(trained, *(grads for _, grads in results), strict=True):
            p.grad = sum(parts[1:], start=parts[0])
        loss = sum(value for value, _ in results)
        factor = rate_factor(fraction, progress.step)
        muon.param_groups[0]["lr"] = MUON_RATE * factor
        for group in adam.param_groups:
            group["lr"] = group["peak"] * factor
        nn.utils.clip_grad_norm_(others, 1.0)
        muon.update(spare_experts=progress.step % EXPERT_EVERY != 0)
        adam.step()
        model.zero_grad(set_to_none=True)
        steering.update(fraction)
        progress.step += 1
        progress.tokens += batch.shape[0] * length
        progress.seconds = before + time.monotonic() - started
        mean_loss, mean_count = mean_loss + loss, mean_count + 1
        if progress.step % args.log_every == 0:
            entry = {
                "step": progress.step,
                "seconds": round(progress.seconds),
                "loss": round(mean_loss / mean_count, 4),
                "load_spread": round(steering.spread(), 1),
            }
            mean_loss, mean_count = 0.0, 0
            progress.curve.append(entry)
            rate = (progress.tokens) / progress.seconds
            print(json.dumps(entry), f"{rate:.0f} tok/s", flush=True)
        if progress.seconds - saved_at > args.save_every:
            saved_at = progress.seconds
            save(checkpoint, model, muon, adam, progress)
    save(checkpoint, model, muon, adam, progress)
    middle = torch.load(args.cache / "middle.pt", weights_only=True)
    export(finish(model.state_dict(), middle), len(tokenizer), args.out)
    facts = {"seed": SEED, "steps": progress.step, "tokens": progress.tokens,
             "wall_seconds": round(progress.seconds), "machine": f"{args.threads} CPU threads",
             "loss_curve": progress.curve}  # fmt: skip
    (args.cache / "training.json").write_text(json.dumps(facts))


def _is_matrix(name: str) -> bool:
    return name.endswith("_proj.weight") or name.endswith("_proj")


def save(path: Path, model: nn.Module, muon: Any, adam: Any, progress: Progress) -> None:
    """Replace the checkpoint in one step, so that an interruption never leaves half a file."""
    state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(),
             "progress": asdict(progress)}  # fmt: skip
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=DATA / "tiny_model")
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=float, default=240, help="seconds")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
