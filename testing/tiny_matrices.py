"""Every expert matrix of the embedded tiny model with the second moments of its real inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import linear, silu

from erniequant_data import calibration_text, heldout_text, tiny_model_dir

WINDOW = 512


@dataclass(frozen=True, eq=False)
class Layer:
    """One expert matrix: ``weight`` float32 ``[N, K]``, ``hessian`` float32 ``[K, K]``."""

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor


@lru_cache(maxsize=2)
def expert_matrices(tokens: int = 32768, held_out: bool = False) -> tuple[Layer, ...]:
    """Gate over up, and down, of all experts of all layers, from stock transformers on the
    calibration text or on text that nothing has seen; tokens count by their squared routing
    weight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32).eval()
    text = heldout_text() if held_out else calibration_text()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir())
    ids = torch.tensor(tokenizer(text[: 8 * tokens])["input_ids"][:tokens])
    sums: dict[tuple[int, int, str], torch.Tensor] = {}

    def watch(index: int) -> Any:
        def hook(experts: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen, weights = inputs
            for e in range(experts.num_experts):
                token, slot = torch.where(chosen == e)
                x, p = hidden[token], weights[token, slot, None].float()
                gate, up = linear(x, experts.gate_up_proj[e]).chunk(2, -1)
                for part, y in (("gate_up", x * p), ("down", silu(gate) * up * p)):
                    key = (index, e, part)
                    sums[key] = sums.get(key, 0) + y.T.double() @ y.double()

        return hook

    layers = [
        (i, x.mlp.experts) for i, x in enumerate(model.model.layers) if hasattr(x.mlp, "gate")
    ]
    handles = [experts.register_forward_pre_hook(watch(i)) for i, experts in layers]
    with torch.no_grad():
        for window in ids.split(WINDOW):
            model(window[None])
    for handle in handles:
        handle.remove()
    return tuple(_matrices(layers, sums))


def _matrices(
    layers: list[tuple[int, Any]], sums: dict[tuple[int, int, str], torch.Tensor]
) -> Iterator[Layer]:
    for index, experts in layers:
        for e in range(experts.num_experts):
            for part in ("gate_up", "down"):
                weight = getattr(experts, f"{part}_proj")[e].detach().clone()
                yield Layer(f"{index}.{e}.{part}", weight, sums[index, e, part].float() / 1e3)
