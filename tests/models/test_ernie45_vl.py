"""Layers, vision tower and positions of a vision-language model against the whole stock model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import AutoModelForImageTextToText

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.data.image_records import ImageTextReader
from erniequant.data.images import ImageReader
from erniequant.data.inputs import ModelInput, image_positions
from erniequant.data.records import read_records
from erniequant.models.architecture import EXPERT_MATRICES
from erniequant.models.config_check import bounded_architecture, require_fit
from tests.micro_vl import as_baidu_releases_it

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stock(micro_vl: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        micro_vl, dtype=torch.float32, experts_implementation="eager"
    )


@pytest.fixture(scope="module")
def inputs(micro_vl: Path, micro_records: Path) -> list[ModelInput]:
    """One image, two images, an image within the text, and text alone."""
    from erniequant.data.tokenizers import load_tokenizer

    source = open_checkpoint(micro_vl)
    model = bounded_architecture(source.config, source.headers)
    reader = ImageTextReader(
        load_tokenizer(micro_vl), model.images, ImageReader(model.images, micro_vl)
    )
    records = list(read_records(micro_records))[:3]
    found = [reader.read(record, where, micro_records.parent) for record, where in records]
    return [*found, ModelInput(torch.arange(3, 40))]


@pytest.mark.parametrize("number", range(4))
def test_layer_by_layer_equals_the_stock_model(
    micro_vl: Path, stock: Any, inputs: list[ModelInput], number: int
) -> None:
    entry = inputs[number]
    with torch.no_grad():
        expected = stock(**entry.batch(), output_hidden_states=True).hidden_states
    source = open_checkpoint(micro_vl)
    model = bounded_architecture(source.config, source.headers)
    sizes = model.sizes
    assert sizes.moe_layers == (1, 2)
    hidden = source.tensor("model.embed_tokens.weight").float()[entry.ids][None]
    if entry.placeholder is not None:
        patches = torch.cat([image.patches for image in entry.images])
        grid = torch.tensor([image.grid for image in entry.images])
        hidden[0, entry.placeholder] = model.embed_images(source, patches, grid, CPU)
    for index in range(sizes.layers):
        torch.testing.assert_close(hidden, expected[index], rtol=1e-4, atol=1e-4)
        layer = model.load_layer(source, index, CPU)
        hidden = model.attend(layer, hidden, entry.positions)
        if index not in sizes.moe_layers:
            hidden = model.dense_mlp(layer, hidden)
            continue
        hidden, found = model.route(layer, hidden, entry.vision)
        text, vision = sizes.groups
        seen = torch.zeros(len(entry), dtype=torch.bool) if entry.vision is None else entry.vision
        assert torch.equal(found.rows_of(vision), torch.where(seen)[0])
        assert torch.equal(found.rows_of(text), torch.where(~seen)[0])
        for expert in range(sizes.experts):
            gate, up, down = (
                source.tensor(model.expert_matrix_name(index, expert, m)).float()
                for m in EXPERT_MATRICES
            )
            rows, weight = found.routed_to(expert)
            x = found.x[rows]
            output = linear(silu(linear(x, gate)) * linear(x, up), down)
            hidden[0].index_add_(0, rows, output * weight[:, None])
    last = model_norm(source, hidden, stock)
    torch.testing.assert_close(last, expected[-1], rtol=1e-4, atol=1e-4)


def model_norm(source: Any, hidden: torch.Tensor, stock: Any) -> torch.Tensor:
    with torch.no_grad():
        return stock.model.language_model.norm(hidden)


def test_both_names_of_the_tower(
    micro_vl: Path, stock: Any, inputs: list[ModelInput], tmp_path: Path
) -> None:
    image = inputs[0].images[0]
    grid = torch.tensor([image.grid])
    with torch.no_grad():
        expected = stock.model.get_image_features(image.patches, grid).pooler_output[0]
    for folder in (micro_vl, as_baidu_releases_it(micro_vl, tmp_path / "baidu")):
        source = open_checkpoint(folder)
        require_fit(source.config, source.headers)
        model = bounded_architecture(source.config, source.headers)
        found = model.embed_images(source, image.patches, grid, CPU)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        "i",
        "tti",
        "itt",
        "titti",
        # The second image is wider than the first is tall, so the longer side decides.
        "tIiJt",
    ],
)
def test_positions_are_those_of_transformers(stock: Any, layout: str) -> None:
    grids = {"i": (1, 4, 6), "I": (1, 2, 10), "J": (1, 8, 2)}
    flags: list[bool] = []
    used = []
    for letter in layout:
        if letter == "t":
            flags += [False] * 3
        else:
            used.append(grids[letter])
            # A marker on either side, as around every image of a text.
            flags += [False, *[True] * (used[-1][1] * used[-1][2] // 4), False]
    placeholder = torch.tensor(flags)
    expected, _ = stock.model.get_rope_index(
        placeholder[None].long(), placeholder[None].int(), torch.tensor(used)
    )
    assert torch.equal(image_positions(placeholder, used, 2), expected[:, 0])


def test_a_tensor_that_does_not_fit_is_named(micro_vl: Path) -> None:
    source = open_checkpoint(micro_vl)
    from dataclasses import replace

    from erniequant.errors import ErnieQuantError

    for name in (
        "model.layers.1.mlp.gate.weight_1",
        "model.vision_model.blocks.1.attn.qkv.bias",
        "model.resampler_model.temporal_linear.2.weight",
        "model.layers.2.mlp.experts.7.up_proj.weight",
    ):
        headers = dict(source.headers)
        headers[name] = replace(headers[name], shape=(3, 5))
        with pytest.raises(ErnieQuantError, match=f"{name} has shape"):
            require_fit(source.config, headers)
        del headers[name]
        with pytest.raises(ErnieQuantError, match=f"{name} is missing"):
            require_fit(source.config, headers)
