"""How the original's loss depends on the hidden states that leave each layer: one backward pass,
streamed layer by layer.

The loss is the negative log-likelihood of tokens that the original itself draws, so the second
moments of its gradients are the Fisher information: to first order, an error ``e`` of the hidden
states moves the original's distribution by ``e^T G e / 2`` in KL divergence. Rounding against it is
the idea of YAQA (arXiv 2505.22988).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from erniequant.calibration.rows import RowPool, Rows
from erniequant.checkpoint.reader import Checkpoint
from erniequant.data.inputs import ModelInput
from erniequant.encoding.products import fast_products
from erniequant.models.architecture import EXPERT_MATRICES, Architecture
from erniequant.models.head import Head, load_head
from erniequant.tuning.decoder_layer import DecoderLayer, FixedExpert
from erniequant.tuning.model import POSITIONS
from erniequant.tuning.training import Window

TOKENS = 16_384
"""Tokens of the backward pass: six for every dimension of the 21B's hidden states."""


def gradient_moments(
    checkpoint: Checkpoint,
    model: Architecture,
    windows: Sequence[Window],
    embedded: Rows,
    pool: RowPool,
    device: torch.device,
    threads: int,
    keep: Callable[[int, torch.Tensor], None],
) -> None:
    """Second moments of the gradients with respect to what leaves each quantised layer.

    The gradient of every token is scaled to length one first: a few tokens have gradients a hundred
    times as large as the rest.

    Args:
        windows: calibration windows; as many of them are taken as hold `TOKENS` tokens.
        embedded: hidden states that go into the first layer, float32 ``[T, H]``.
        keep: takes the number of a layer and its moments float32 ``[H, H]``, with trace ``H``;
            from the last layer to the first.
    """
    windows, states = _some(windows, embedded)
    with ThreadPoolExecutor(threads if device.type == "cpu" else 1) as workers:

        def each(work: Callable[[slice, ModelInput], Any]) -> list[Any]:
            return [job.result() for job in [workers.submit(work, *w) for w in windows]]

        entering: list[Rows] = []
        for index in range(model.sizes.layers):
            entering.append(pool.empty(*states.shape))
            entering[-1].tensor.copy_(states)
            entering[-1].release()
            layer = _original_layer(checkpoint, model, index, device)

            def forward(rows: slice, window: ModelInput, layer: DecoderLayer = layer) -> None:
                with fast_products(device, gradients=False):
                    states[rows] = layer(states[rows][None].to(device), window)[0].float().cpu()

            each(forward)
        head = load_head(checkpoint, model, device)
        each(lambda rows, _: states[rows].copy_(_gradient_of_head(head, states[rows], rows.start)))
        for index in reversed(range(model.sizes.layers)):
            if index in model.sizes.moe_layers:
                keep(index, _moments(states))
            if index == model.sizes.moe_layers[0]:
                return
            layer = _original_layer(checkpoint, model, index, device)
            inputs = entering.pop()

            def backward(
                rows: slice, window: ModelInput, layer: DecoderLayer = layer, inputs: Rows = inputs
            ) -> None:
                with fast_products(device, gradients=True):
                    hidden = inputs.tensor[rows][None].clone().to(device).requires_grad_()
                    output = layer(hidden, window)
                    (found,) = torch.autograd.grad(output, hidden, states[rows][None].to(device))
                states[rows] = found[0].cpu()

            each(backward)


def _some(windows: Sequence[Window], embedded: Rows) -> tuple[list[Window], torch.Tensor]:
    """Evenly spaced windows, with rows of their own, and the hidden states of these rows."""
    tokens = sum(len(window) for _, window in windows)
    found: list[Window] = []
    parts = []
    end = 0
    for rows, window in windows[:: max(tokens // TOKENS, 1)]:
        found.append((slice(end, end + len(window)), window))
        parts.append(embedded.tensor[rows].clone())
        embedded.release()
        end += len(window)
    return found, torch.cat(parts)


def _original_layer(
    checkpoint: Checkpoint, model: Architecture, index: int, device: torch.device
) -> DecoderLayer:
    module = model.load_layer(checkpoint, index, device)
    experts = {}
    if index in model.sizes.moe_layers:
        for expert in range(model.sizes.experts):
            gate, up, down = (
                checkpoint.tensor(model.expert_matrix_name(index, expert, matrix)).to(device)
                for matrix in EXPERT_MATRICES
            )
            experts[expert] = FixedExpert.of(torch.cat([gate, up]), down)
    return DecoderLayer(model, module, experts, {})


def _gradient_of_head(head: Head, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """Gradient ``[n, H]`` of the negative log-likelihood of drawn tokens."""
    generator = torch.Generator().manual_seed(seed)
    device, parts = head.norm.device, []
    for part in hidden.split(POSITIONS):
        with fast_products(device, gradients=True):
            # A copy: other threads write into the table that it is a part of.
            x = part.clone().to(device).requires_grad_()
            logits = head.logits(x)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
            loss = torch.nn.functional.cross_entropy(
                logits, drawn[:, 0].to(device), reduction="sum"
            )
            parts.append(torch.autograd.grad(loss, x)[0].cpu())
    return torch.cat(parts)


def _moments(gradient: torch.Tensor) -> torch.Tensor:
    """Second moments ``[H, H]`` of gradients ``[T, H]``, each scaled to mean square one; tokens
    without a finite one are left out."""
    size = gradient.square().mean(-1, keepdim=True).sqrt()
    sound = (torch.isfinite(size) & (size > 0))[:, 0]
    scaled = gradient[sound] / size[sound]
    return scaled.T @ scaled / max(len(scaled), 1)
