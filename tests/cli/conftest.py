"""The command line in process, over a library whose slow parts are replaced by recording fakes."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner


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
    """`erniequant.load` knows any folder; records what it was asked for."""
    asked = []

    def load(folder, device="auto", dtype=None):
        asked.append((folder, device, dtype))
        return Bigram(len(folder)), LetterTokenizer(shift=int(folder == "other-tokens"))

    monkeypatch.setattr(importlib.import_module("erniequant.loading"), "load", load)
    return asked
