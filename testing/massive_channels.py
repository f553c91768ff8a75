"""Matrices whose inputs have one or two massive channels, as the down projections of the second and
the last-but-one layer of real models do: a few tokens carry most of the Hessian's trace."""

import torch


def massive_layer(
    inputs: int, tokens: int, share: float, channels: int, size: float = 1.0, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[128, K]`` and Hessian ``[K, K]``.

    Args:
        tokens: ordinary tokens, heavy-tailed and correlated; fewer than inputs make the Hessian
            rank-deficient.
        share: share of the trace that the massive channels have.
        channels: number of massive channels.
        size: size of the massive channels' weights relative to the others.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(tokens, inputs) * normal(inputs).mul(0.8).exp() * normal(tokens, inputs)
    x = x @ (torch.eye(inputs) + 0.5 * normal(inputs, inputs) / inputs**0.5)
    ordinary = x.T @ x / tokens
    chosen = torch.randperm(inputs, generator=generator)[:channels]
    token = 3 * normal(inputs) * ordinary.diagonal().sqrt()
    energy = share / (1 - share) * ordinary.diagonal().sum() * tokens / channels
    token[chosen] = energy.sqrt()
    weight = 0.02 * normal(128, inputs)
    weight[:, chosen] *= size
    return weight, ordinary + torch.outer(token, token) / tokens
