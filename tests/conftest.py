"""Fixtures shared by all tests: a micro random ERNIE 4.5 MoE made in-process."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Its own library is decorated when it is first imported,
    # by whichever test that is, so this cannot wait for tests/kernels.
    os.environ["TRITON_INTERPRET"] = "1"

Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """A test that draws without a generator draws the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def micro_ernie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bf16 checkpoint with Baidu's per-expert tensor names.

    Hidden 96 is not a power of two (largest rotation block 32), the first layer is dense, routers
    are float32 as in published models, their bias is not zero, and the embedding is tied.
    """
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(7)
    config = Ernie4_5_MoeConfig(
        vocab_size=128, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        moe_num_experts=8, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=2,
        moe_layer_start_index=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Ernie4_5_MoeForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.float()
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data.normal_(0, 0.02)
        elif parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("micro") / "micro_ernie"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def micro_source(micro_ernie: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`micro_ernie` with a tokenizer of one token per character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("source") / "micro_source"
    shutil.copytree(micro_ernie, folder)
    vocabulary = {"<unk>": 0, "</s>": 1} | {chr(30 + i): i for i in range(2, 96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_ernie(micro_ernie: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`micro_ernie` with quantised experts; any words decode, so they are random.

    Layer 1 and 2 differ in code, register length and tile, so mixing them up shows.
    """
    from erniequant.checkpoint import CheckpointWriter, open_checkpoint
    from erniequant.checkpoint.writer import copy_companions, write_json
    from erniequant.format.decoding import encode_scale
    from erniequant.format.schema import (
        LayerSpec,
        MatrixSpec,
        QuantizationMetadata,
        experts_module,
        guard_tensor,
        layer_key_of,
        layer_params,
    )

    layers = {
        "1": LayerSpec(MatrixSpec("cc2", 12, 64, 32), MatrixSpec("cc4", 10, 32, 64)),
        "2": LayerSpec(MatrixSpec("cc3", 16, 32, 32), MatrixSpec("cc2", 16, 32, 1)),
    }
    source = open_checkpoint(micro_ernie)
    folder = tmp_path_factory.mktemp("packed") / "packed_ernie"
    generator = torch.Generator().manual_seed(5)
    with CheckpointWriter(folder, max_shard_bytes=60_000) as writer:
        for name in source.names():
            if layer_key_of(name) is None:
                writer.add(name, source.tensor(name))
        for key, spec in layers.items():
            prefix = f"model.{experts_module(key)}."
            for name, (shape, dtype) in layer_params(8, 96, 64, spec).items():
                words = torch.randint(-(2**31), 2**31, shape, generator=generator)
                tensor = words.to(dtype)
                if name.endswith("_scale"):
                    tensor = encode_scale(torch.rand(shape, generator=generator) * 0.1 + 0.02)
                elif name.endswith("_signs"):
                    tensor = tensor[:, :1].repeat(1, shape[1], 1)
                elif dtype == torch.bfloat16:
                    tensor = guard_tensor()
                writer.add(prefix + name, tensor)
        writer.finish()
    copy_companions(micro_ernie, folder)
    metadata = QuantizationMetadata(layers, producer="tests")
    write_json(folder / "config.json", {**source.config, "quantization_config": metadata.to_dict()})
    return folder


@pytest.fixture
def damaged(packed_ernie: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A function that writes a copy of `packed_ernie` in one file after an edit of its tensors."""

    from safetensors.torch import load_file, save_file

    def write(edit: Edit) -> Path:
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(packed_ernie.glob("*.safetensors")):
            tensors |= load_file(shard)
        edit(tensors)
        folder = tmp_path / "damaged"
        folder.mkdir()
        shutil.copy(packed_ernie / "config.json", folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write
