"""Vision-language models have two sets of experts in a layer; both are packed, and told apart."""

from pathlib import Path
from typing import Any

import pytest
import torch

import erniequant
from erniequant.checkpoint import CheckpointWriter, open_checkpoint
from erniequant.checkpoint.files import write_json
from erniequant.formats.verbs import inspect, verify
from erniequant.packing.decoding import encode_scale
from erniequant.packing.layer_keys import experts_module, layer_key_of
from erniequant.packing.schema import LayerSpec, MatrixSpec, QuantizationMetadata, layer_params
from erniequant.runtime.experts import PackedExperts

EXPERTS, HIDDEN, INNER = 4, 64, {"text_moe": 64, "vision_moe": 32}
SPEC = LayerSpec(MatrixSpec("cc2", 10, 32, 64), MatrixSpec("cc3", 12, 32, 32))
IDS = torch.arange(3, 21)[None]
# Ordinary tokens, an image, ordinary tokens again; vision experts see only the middle.
TYPES = torch.tensor([[0] * 5 + [1] * 8 + [0] * 5])


@pytest.fixture(scope="module")
def stock_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    torch.manual_seed(2)
    text = {
        "vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "moe_k": 2, "moe_num_experts": EXPERTS,
        "moe_intermediate_size": list(INNER.values()), "moe_num_shared_experts": 1,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4],
        },
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "patch_size": 4}  # fmt: skip
    special = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    ids = {f"{name}_token_id": 120 + i for i, name in enumerate(special)}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **ids)
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("vl") / "stock"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed_vl(stock_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_checkpoint(stock_vl)
    folder = tmp_path_factory.mktemp("vl") / "packed"
    generator = torch.Generator().manual_seed(9)
    keys = [f"{layer}.{group}" for layer in (1, 2) for group in INNER]
    with CheckpointWriter(folder) as writer:
        for name in source.names():
            if layer_key_of(name) is None:
                writer.add(name, source.tensor(name))
        for key in keys:
            inner = INNER[key.split(".")[1]]
            for name, (shape, dtype) in layer_params(EXPERTS, HIDDEN, inner, SPEC).items():
                tensor = torch.randint(-(2**31), 2**31, shape, generator=generator).to(dtype)
                if name.endswith("_scale"):
                    tensor = encode_scale(torch.rand(shape, generator=generator) * 0.2)
                elif name.endswith("_signs"):
                    tensor = tensor[:, :1].repeat(1, shape[1], 1)
                writer.add(f"model.{experts_module(key)}.{name}", tensor)
        writer.finish()
    metadata = QuantizationMetadata(dict.fromkeys(keys, SPEC), "tests")
    write_json(folder / "config.json", {**source.config, "quantization_config": metadata.to_dict()})
    return folder


@torch.no_grad()
def logits(model: Any, types: torch.Tensor = TYPES) -> torch.Tensor:
    return model(input_ids=IDS, moe_mm_token_type_ids=types).logits


def test_loads_and_equals_its_export(packed_vl: Path, tmp_path: Path) -> None:
    model, _ = erniequant.load(packed_vl, device="cpu")
    packed = [n for n, m in model.named_modules() if isinstance(m, PackedExperts)]
    assert [name.split("layers.")[1] for name in packed] == [
        f"{layer}.mlp.{group}.experts" for layer in (1, 2) for group in INNER
    ]
    found = logits(model)
    # The types matter: with text alone, the middle tokens see other experts.
    assert (logits(model, TYPES * 0) - found).abs().max() > 1e-2
    erniequant.export(packed_vl, tmp_path / "plain", "fp32")
    stock, _ = erniequant.load(tmp_path / "plain", device="cpu")
    assert not any(isinstance(m, PackedExperts) for m in stock.modules())
    expected = logits(stock)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_save_and_load_again(packed_vl: Path, tmp_path: Path) -> None:
    model, _ = erniequant.load(packed_vl, device="cpu")
    model.save_pretrained(tmp_path / "again")
    again, _ = erniequant.load(tmp_path / "again", device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_inspect_and_verify(packed_vl: Path, stock_vl: Path) -> None:
    found = inspect(packed_vl)
    assert found.quantized_layers == ("1.text_moe", "1.vision_moe", "2.text_moe", "2.vision_moe")
    assert found.expert_weights == 2 * EXPERTS * 3 * HIDDEN * (64 + 32)
    assert found.total_weights == inspect(stock_vl).total_weights
    report = verify(packed_vl, stock_vl)
    assert report.ok, report.problems
    assert len(report.errors) == 2 * 2 * EXPERTS * 3
