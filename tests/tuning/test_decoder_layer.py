"""Layers with fixed experts against the stock model, in values and in gradients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.data.image_records import ImageTextReader
from erniequant.data.images import ImageReader
from erniequant.data.inputs import ModelInput
from erniequant.data.records import read_records
from erniequant.data.tokenizers import load_tokenizer
from erniequant.encoding.products import fast_products
from erniequant.models.architecture import EXPERT_MATRICES, Architecture
from erniequant.models.registry import architecture_of
from erniequant.tuning.decoder_layer import DecoderLayer, FixedExpert, ScaleFactors
from erniequant.tuning.layer import scale_factors, trainable

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FAMILIES = ["micro_ernie", "micro_dense", "micro_vl"]

Matrices = tuple[torch.Tensor, torch.Tensor]


pytestmark = pytest.mark.usefixtures("float32_products")


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def window(folder: Path, micro_records: Path) -> ModelInput:
    """Text; where there is vision, an image within text."""
    model = architecture_of(open_checkpoint(folder).config)
    if model.images is None:
        # 41 tokens: no multiple of anything.
        return ModelInput(torch.arange(3, 85, 2))
    reader = ImageTextReader(
        load_tokenizer(folder), model.images, ImageReader(model.images, micro_records.parent)
    )
    record, where = list(read_records(micro_records))[2]
    found = reader.read(record, where, micro_records.parent)
    assert found.vision is not None and 0 < int(found.vision.sum()) < len(found)
    return found


def stock_of(folder: Path, model: Architecture) -> tuple[Any, Any]:
    """The stock model in float32, and its layers."""
    auto = getattr(transformers, model.auto_class)
    stock = auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    decoder = stock.model if model.images is None else stock.model.language_model
    return stock, decoder.layers


def stock_experts(model: Architecture, layer: Any) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Views of every expert of a stock layer by its number: gate, up and down."""
    for group in model.sizes.groups:
        if model.is_dense():
            yield 0, [getattr(layer.mlp, name).weight for name in EXPERT_MATRICES]
            continue
        experts = (layer.mlp if model.images is None else getattr(layer.mlp, group.name)).experts
        for number in group.numbers:
            row = number - group.first
            yield number, [*experts.gate_up_proj[row].chunk(2), experts.down_proj[row]]


def run_stock(stock: Any, layers: Any, window: ModelInput) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[1, T, H]`` that enter the first layer and that leave the last."""
    ends: list[torch.Tensor] = []
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: ends.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        layers[-1].register_forward_hook(
            lambda *a: ends.append(a[2][0] if isinstance(a[2], tuple) else a[2])
        ),
    ]
    stock(**window.batch())
    for hook in hooks:
        hook.remove()
    first, last = ends
    return first.detach(), last.reshape(first.shape)


def our_layers(
    folder: Path, model: Architecture, factors: Callable[[int], dict[int, ScaleFactors]]
) -> list[tuple[DecoderLayer, dict[str, torch.Tensor]]]:
    """The layers of a checkpoint with its own experts, and their parameters to be trained."""
    source, found = open_checkpoint(folder), []
    for index in range(model.sizes.layers):
        module = model.load_layer(source, index, CPU)
        experts = {}
        for number in range(model.sizes.experts if index in model.sizes.moe_layers else 0):
            gate, up, down = (
                source.tensor(model.expert_matrix_name(index, number, matrix))
                for matrix in EXPERT_MATRICES
            )
            experts[number] = FixedExpert.of(torch.cat([gate, up]), down)
        parameters = trainable(module)
        found.append((DecoderLayer(model, module, experts, factors(index)), parameters))
    return found


def test_values_and_gradients_are_the_stock_models(folder: Path, window: ModelInput) -> None:
    model = architecture_of(open_checkpoint(folder).config)
    generator = torch.Generator().manual_seed(3)
    of_layer: dict[int, dict[int, ScaleFactors]] = {}
    for index in model.sizes.moe_layers:
        # Every other expert has its own scales.
        of_layer[index] = {
            number: ScaleFactors(*(
                (torch.rand(f.numel(), generator=generator) + 0.5).requires_grad_()
                for f in (both.gate_up, both.down)
            ))
            for number, both in scale_factors(
                dict.fromkeys(range(0, model.sizes.experts, 2)), model, CPU  # type: ignore[arg-type]
            ).items()
        }  # fmt: skip
    stock, layers = stock_of(folder, model)
    plain: dict[tuple[int, int], list[torch.Tensor]] = {}
    with torch.no_grad():
        for index, factors in of_layer.items():
            for number, matrices in stock_experts(model, layers[index]):
                plain[index, number] = [matrix.clone() for matrix in matrices]
                if number in factors:
                    both = factors[number]
                    rows = (*both.gate_up.chunk(2), both.down)
                    for matrix, factor in zip(matrices, rows, strict=True):
                        matrix.mul_(factor[:, None])
    first, expected = run_stock(stock, layers, window)
    direction = torch.randn(expected.shape, generator=generator)
    (expected * direction).sum().backward()

    found = our_layers(folder, model, lambda index: of_layer.get(index, {}))
    with fast_products(CPU, gradients=True):
        hidden = first
        for layer, _ in found:
            hidden = layer(hidden, window)
        (hidden * direction).sum().backward()
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    compared = 0
    for stock_layer, (_, parameters) in zip(layers, found, strict=True):
        of_stock = dict(stock_layer.named_parameters())
        for name, parameter in parameters.items():
            theirs = of_stock[name].grad
            assert theirs is not None and parameter.grad is not None, name
            far = (parameter.grad - theirs).norm() / theirs.norm().clamp_min(1e-6)
            assert far < 1e-4, name
            compared += 1
        left = {name for name in of_stock if ".experts." not in name and name not in parameters}
        assert all("e_score_correction_bias" in n or model.is_dense() for n in left), left
    assert compared >= 6 * model.sizes.layers
    # A factor of a row: the gradient of the row of the weight along the row without it.
    for index, factors in of_layer.items():
        for number, grads in stock_experts(model, _grads(model, layers[index])):
            if number not in factors:
                continue
            both = factors[number]
            wanted = [(g * w).sum(1) for g, w in zip(grads, plain[index, number], strict=True)]
            got = (*_grad(both.gate_up).chunk(2), _grad(both.down))
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    """Its gradient; no token chose an expert without."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _grads(model: Architecture, layer: Any) -> Any:
    """The layer with the gradients of its parameters in their places."""
    for parameter in layer.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return layer


def test_experts_may_be_decoded_when_they_are_needed(micro_ernie: Path) -> None:
    model = architecture_of(open_checkpoint(micro_ernie).config)
    window = ModelInput(torch.arange(3, 44))
    hidden = torch.randn(1, 41, model.sizes.hidden)
    ((layer, _),) = our_layers(micro_ernie, model, lambda _: {})[1:2]
    decoded = []

    def later(number: int) -> FixedExpert:
        def weights() -> Matrices:
            decoded.append(number)
            return layer.experts[number].weights()

        return FixedExpert(weights)

    lazy = DecoderLayer(model, layer.module, {n: later(n) for n in layer.experts}, {})
    with fast_products(CPU, gradients=False):
        assert torch.equal(layer(hidden, window), lazy(hidden, window))
    assert decoded and len(set(decoded)) == len(decoded)
