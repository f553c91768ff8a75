"""Routers for a mixture whose experts come in pairs of copies: uneven, and made from the inputs.

A pair's logits are opposite, z and -z, and so are its selection biases, so exactly one of the two
is chosen. The row behind z is a principal component of the layer's inputs, hence the two copies see
different kinds of tokens; the bias puts the border where the popular copy takes its share. Logits
are so small that every routing weight stays one quarter, so the mixture computes what the dense
model computes.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Shares of tokens that the popular copies of the four pairs take; layer by layer, the pairs (that
# is, the components) swap them.
SHARES = (0.7, 0.8, 0.9, 0.99)
# Greatest |logit| on the tokens that routers are made from. Routing weights are then within
# 4e-4 of 1/4, and far above float32's rounding of a softmax at 1/8, which is 7e-9.
LARGEST = 1e-3


@dataclass(frozen=True)
class Router:
    """Gate ``weight`` [experts, hidden] and selection ``bias`` [1, experts], float32."""

    weight: torch.Tensor
    bias: torch.Tensor


def uniform(experts: int, hidden: int) -> Router:
    """Every token uses all experts alike."""
    return Router(torch.zeros(experts, hidden), torch.zeros(1, experts))


def spread(ids: torch.Tensor, windows: int = 16, length: int = 512) -> torch.Tensor:
    """Windows [windows, length] at equal distances in the ids of a text, which has to be longer."""
    starts = torch.linspace(0, len(ids) - length, windows).long()
    return torch.stack([ids[start : start + length] for start in starts])


@torch.no_grad()
def inputs(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """What goes into each layer's MLP, [tokens, hidden] per layer, without each window's first
    token, whose activations are unlike all others'."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, given, kept=kept: kept.append(given[0][0, 1:])
        )
        for layer, kept in zip(model.model.layers, seen, strict=True)
    ]
    for window in windows:
        model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def paired(tokens: torch.Tensor, shares: tuple[float, ...]) -> Router:
    """A router for as many pairs as there are shares, from its inputs [tokens, hidden].

    The first of pair j takes ``shares[j]`` of these tokens, the second the tail of component j.
    """
    centred = tokens.double() - tokens.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    components = vectors[:, values.argsort(descending=True)[: len(shares)]].T
    # The long tail of the distribution goes to the rare copy.
    tails = (centred @ components.T).pow(3).mean(0)
    components = components * torch.where(tails > 0, -1.0, 1.0)[:, None]
    logits = tokens.double() @ components.T
    scale = LARGEST / logits.abs().amax(0)
    borders = torch.stack(
        [logits[:, pair].quantile(1 - share) for pair, share in enumerate(shares)]
    )
    # Near zero, the softmax of eight logits has the slope 1/8.
    rows, lean = components * scale[:, None], -borders * scale / (2 * len(shares))
    weight = torch.stack([rows, -rows], 1).flatten(0, 1)
    return Router(weight.float(), torch.stack([lean, -lean], 1).reshape(1, -1).float())


def learned(model: Any, windows: torch.Tensor) -> list[Router]:
    """A router for every layer of the dense model, from what its MLPs get on these windows."""
    routers = []
    for layer, tokens in enumerate(inputs(model, windows)):
        turn = layer % len(SHARES)
        routers.append(paired(tokens, SHARES[turn:] + SHARES[:turn]))
    return routers


def chosen(router: Router, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and routing weights [tokens, experts / 2] of the experts that the model uses."""
    probabilities = (tokens.float() @ router.weight.T).softmax(1)
    _, experts = (probabilities + router.bias).topk(router.weight.shape[0] // 2)
    weights = probabilities.gather(1, experts)
    return experts, weights / weights.sum(1, keepdim=True)
