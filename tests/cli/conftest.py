"""The command line in process, over fakes that record and over a random model that is real but
small."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import erniequant_data

# Of `speakers`: so few that filling them takes a moment.
POSITIONS = 24
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class LetterTokenizer:
    chat_template = None

    def __init__(self, shift=0):
        self.shift = shift

    def __call__(self, text, add_special_tokens=True):
        assert add_special_tokens is False
        return {"input_ids": [(ord(letter) + self.shift) % 7 for letter in text]}


class Bigram(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(7, 7, generator=generator))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def run():
    """Run the command line on arguments; the result has exit_code, stdout and stderr."""
    from erniequant_cli.main import app

    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def models(monkeypatch):
    """`load` knows any folder; records what it was asked for."""
    asked = []

    def load(folder, device="auto", dtype=None, reference=None):
        asked.append((folder, device, dtype))
        return Bigram(len(folder)), LetterTokenizer(shift=int(folder == "other-tokens"))

    # The module, not the function of that name that `erniequant` offers.
    monkeypatch.setattr(importlib.import_module("erniequant.formats.verbs"), "load", load)
    return asked


@pytest.fixture(scope="session")
def speaking_ernie(tmp_path_factory):
    """Folder of a random ERNIE 4.5 MoE of two MoE layers with the tokenizer of the embedded
    model."""
    from transformers import AutoTokenizer, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    tokenizer = erniequant_data.tiny_model_dir()
    torch.manual_seed(3)
    config = Ernie4_5_MoeConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        hidden_size=96,
        intermediate_size=64,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    )
    model = Ernie4_5_MoeForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        # Weights as small as the default leave nothing for the experts to say.
        if parameter.dim() > 1 and "bias" not in name:
            parameter.data.normal_(0, 0.15)
    folder = tmp_path_factory.mktemp("model") / "speaking_ernie"
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder)
    return folder


@pytest.fixture(scope="session")
def speakers(packed_ernie, packed_vl, packed_dense, tmp_path_factory):
    """A quantised micro model of every kind with a tokenizer and few positions: folders by name."""
    from testing.micro_model import add_tokenizer

    home = tmp_path_factory.mktemp("speakers")
    found = {}
    for name, folder in (("text", packed_ernie), ("vl", packed_vl), ("dense", packed_dense)):
        found[name] = shutil.copytree(folder, home / name)
        config = json.loads((folder / "config.json").read_text())
        config.get("text_config", config)["max_position_embeddings"] = POSITIONS
        (found[name] / "config.json").write_text(json.dumps(config))
        if name != "vl":
            add_tokenizer(found[name])
    return found


@pytest.fixture
def library(monkeypatch):
    """A `quantize` that records its arguments and reports as many degraded matrices as it is
    told."""
    fake = SimpleNamespace(degraded=0, seen=None, work=lambda: None)

    def quantize(src, dst, **options):
        fake.seen = (src, dst, options)
        fake.work()
        return SimpleNamespace(degraded=fake.degraded, to_dict=lambda: {"degraded": fake.degraded})

    module = importlib.import_module("erniequant.quantization.pipeline")
    monkeypatch.setattr(module, "quantize", quantize)
    return fake
