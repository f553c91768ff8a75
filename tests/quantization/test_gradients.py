"""The streamed backward pass against transformers' own, and the head against its logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import erniequant
from erniequant.calibration.rows import RowPool
from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.data.inputs import ModelInput
from erniequant.evaluate.images import evaluation_inputs
from erniequant.models.head import load_head
from erniequant.models.registry import architecture_of
from erniequant.quantization import gradients
from erniequant.quantization.gradients import gradient_moments
from erniequant.quantization.hidden_states import HiddenStates
from testing.micro_model import write_micro_ernie

CPU = torch.device("cpu")
MODELS = ("mixture", "untied", "dense", "vision-language")


pytestmark = pytest.mark.usefixtures("float32_products")


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The checkpoint of one of `MODELS`."""
    if request.param == "untied":
        folder = write_micro_ernie(tmp_path / "untied", tie_word_embeddings=False, use_bias=True)
        tensors = load_file(folder / "model.safetensors")
        # New models have zeros there.
        tensors["lm_head.bias"].normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    fixtures = {"mixture": "micro_ernie", "dense": "micro_dense", "vision-language": "micro_vl"}
    return request.getfixturevalue(fixtures[request.param])


def stock(source: Path) -> Any:
    """transformers' model in float32."""
    images = architecture_of(open_checkpoint(source).config).images
    auto = AutoModelForCausalLM if images is None else AutoModelForImageTextToText
    return auto.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")


def layers_of(model: Any) -> Any:
    return getattr(model.model, "language_model", model.model).layers


def text_windows() -> list[ModelInput]:
    """Windows of uneven lengths, the second longer than the logits in memory at once."""
    ids = torch.randint(2, 96, (350,), generator=torch.Generator().manual_seed(3))
    return [ModelInput(part) for part in ids.split([41, 250, 59])]


def inputs_of(source: Path, request: pytest.FixtureRequest) -> list[ModelInput]:
    if architecture_of(open_checkpoint(source).config).images is None:
        return text_windows()
    model, tokenizer = erniequant.load(source, device="cpu")
    return evaluation_inputs(model, tokenizer, request.getfixturevalue("micro_records"))[:4]


def moments(
    source: Path, inputs: Sequence[ModelInput], threads: int = 2
) -> dict[int, torch.Tensor]:
    checkpoint = open_checkpoint(source)
    model = architecture_of(checkpoint.config).adapt(checkpoint.names())
    windows = CalibrationWindows(tuple(inputs), "", "")
    streams = HiddenStates(checkpoint, model, windows, CPU, 1, RowPool())
    streams.embed()
    found: dict[int, torch.Tensor] = {}
    gradient_moments(
        checkpoint, model, streams.windows, streams.quantized, RowPool(), CPU, threads,
        found.__setitem__,
    )  # fmt: skip
    assert list(found) == sorted(model.sizes.moe_layers, reverse=True)
    return found


def stock_moments(model: Any, inputs: Sequence[ModelInput]) -> list[torch.Tensor]:
    """Of the gradients behind every layer, float64, from one backward pass for each window."""
    left: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)
        left[-1].retain_grad()

    layers = layers_of(model)
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    total = [torch.zeros(model.config.get_text_config().hidden_size) for _ in layers]
    start = 0
    for window in inputs:
        left.clear()
        logits = model(**window.batch()).logits[0]
        generator = torch.Generator().manual_seed(start)
        loss = torch.zeros(())
        for part in logits.split(gradients.POSITIONS):
            drawn = torch.multinomial(part.detach().softmax(-1), 1, generator=generator)
            loss = loss - part.log_softmax(-1).gather(1, drawn).sum()
        loss.backward()
        for index, states in enumerate(left):
            assert states.grad is not None
            gradient = states.grad.reshape(len(window), -1).double()
            unit = gradient / gradient.square().mean(1, keepdim=True).sqrt()
            total[index] = total[index] + unit.T @ unit
        start += len(window)
    for hook in hooks:
        hook.remove()
    return [sums / start for sums in total]


@pytest.mark.parametrize("source", MODELS, indirect=True)
def test_the_moments_are_those_of_the_stock_backward_pass(
    source: Path, request: pytest.FixtureRequest
) -> None:
    inputs = inputs_of(source, request)
    found = moments(source, inputs)
    expected = stock_moments(stock(source), inputs)
    for index, matrix in found.items():
        torch.testing.assert_close(matrix.double(), expected[index], rtol=1e-3, atol=1e-3)
        assert float(matrix.trace()) == pytest.approx(len(matrix), rel=1e-4)
    # Layers differ, so that one does not stand in for another.
    assert (expected[-1] - expected[-2]).norm() > 0.1 * expected[-1].norm()


@pytest.mark.parametrize("source", MODELS, indirect=True)
def test_the_head_ends_as_the_stock_model(source: Path) -> None:
    model = stock(source)
    ids = torch.arange(2, 40)
    states: list[Any] = []
    layers_of(model)[-1].register_forward_hook(lambda *a: states.append(a[2]))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    last = states[0][0] if isinstance(states[0], tuple) else states[0]
    checkpoint = open_checkpoint(source)
    head = load_head(checkpoint, architecture_of(checkpoint.config), CPU)
    found = head.logits(last.reshape(len(ids), -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    doubled = head.logits(last.reshape(len(ids), -1), 2 * head.norm)
    bias = 0 if head.bias is None else head.bias.float()
    torch.testing.assert_close(doubled - bias, 2 * (expected - bias), rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_a_bit(micro_ernie: Path) -> None:
    one, three = (moments(micro_ernie, text_windows(), threads) for threads in (1, 3))
    assert all(torch.equal(one[index], three[index]) for index in one)


def test_of_many_windows_evenly_spaced_ones_are_taken(
    micro_ernie: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [ModelInput(part) for part in torch.arange(2, 96).split(13)]
    every_third = moments(micro_ernie, windows[::3])
    # 94 tokens, three times what is asked for.
    monkeypatch.setattr(gradients, "TOKENS", 30)
    found = moments(micro_ernie, windows)
    assert all(torch.equal(found[index], every_third[index]) for index in found)


def test_tokens_without_a_gradient_are_left_out() -> None:
    sound = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    bad = torch.zeros(3, 6)
    bad[1, 2], bad[2, 0] = float("nan"), float("inf")
    mixed = torch.cat([sound[:2], bad, sound[2:]])
    torch.testing.assert_close(gradients._moments(mixed), gradients._moments(sound))
    # Neither a token's length nor its sign counts.
    scaled = sound * torch.tensor([1.0, -3.0, 1e-6, 1e6, 1.0])[:, None]
    torch.testing.assert_close(gradients._moments(scaled), gradients._moments(sound))
    assert not gradients._moments(bad).any()
