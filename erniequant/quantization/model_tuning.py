"""Training the whole quantised model, as the last step of a run."""

from collections.abc import Callable, Mapping

import torch

from erniequant.calibration.rows import Rows
from erniequant.checkpoint.overlay import Overlay
from erniequant.checkpoint.reader import Checkpoint
from erniequant.formats.base import OutputFormat
from erniequant.models.architecture import Architecture
from erniequant.models.head import NORM, load_head
from erniequant.quantization.layer_tuning import PackedLayer, expert_scales, facts_of, on_disk
from erniequant.quantization.tuned_tensors import Tuned
from erniequant.tuning.config import Training
from erniequant.tuning.decoder_layer import DecoderLayer
from erniequant.tuning.layer import leaves_of, scale_factors, trainable
from erniequant.tuning.model import ModelProblem, tune_model
from erniequant.tuning.training import Window

SMALL = ("layernorm.weight", "gate.weight")
"""Endings of the names of norms and routers. With attention and shared experts too, 16 windows of a
135M model were learned by heart: the divergence on others rose, where that of this few parameters
falls."""


def train_model(
    checkpoint: Checkpoint,
    model: Architecture,
    output: OutputFormat,
    packed: Callable[[int], PackedLayer],
    tuned: Mapping[str, torch.Tensor],
    windows: list[Window],
    embedded: Rows,
    originals: Rows,
    device: torch.device,
    config: Training,
    threads: int,
    keep_decoded: bool,
) -> Tuned:
    """Train norms, routers and the output scales of the experts.

    Args:
        packed: the packed experts of a layer.
        tuned: parameters that layers were given before, by their names in the source.
        embedded, originals: see `ModelProblem`.
        keep_decoded: keep decoded experts in memory, which saves time and changes nothing.
    """
    source = Overlay(checkpoint, tuned)
    layers, stored, parameters = [], [], []
    leaves: list[torch.Tensor] = []
    for index in range(model.sizes.layers):
        module = model.load_layer(source, index, device)
        experts = {}
        if index in model.sizes.moe_layers:
            layer = packed(index)
            experts = layer.fixed(device) if keep_decoded else layer.decoding(device)
            stored.append((index, layer))
        factors = scale_factors(experts, model, device)
        parameters.append(trainable(module, SMALL))
        leaves += [*parameters[-1].values(), *leaves_of(factors)]
        layers.append(DecoderLayer(model, module, experts, factors))
    head = load_head(source, model, device)
    norm = head.norm.clone().requires_grad_()
    problem = ModelProblem(layers, head, norm, windows, embedded, originals, device)
    outcome = tune_model(problem, [*leaves, norm], config, threads)
    if not outcome.epochs:
        return Tuned({}, {}, facts_of(checkpoint, outcome, {}))
    trained = {NORM: norm.detach().cpu().to(checkpoint.tensor(NORM).dtype)}
    for index, named in enumerate(parameters):
        trained |= on_disk(checkpoint, model, index, named)
    scales = {
        name: tensor
        for index, layer in stored
        for name, tensor in expert_scales(output, index, layer, layers[index].factors)
    }
    return Tuned(trained, scales, facts_of(checkpoint, outcome, trained))
