"""The option that says where codes are searched."""

import pytest
import torch

import erniequant
from erniequant.checkpoint.files import sha256_of
from erniequant.codes.viterbi import encoder
from erniequant.errors import ErnieQuantError
from erniequant_kernels import encoder as kernels

OPTIONS = {"bits": 2, "effort": "fast", "no_calib": True, "device": "cpu", "max_tp": 1}


@pytest.fixture
def a_card(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_experts_are_quantised_with_the_chosen_search(micro_ernie, tmp_path, monkeypatch, a_card):
    searched = []

    def spy(code):
        searched.append(code.name)
        return encoder(code)

    monkeypatch.setattr(kernels, "gpu_encoder", spy)
    for search in ("cpu", "cuda"):
        assert not searched
        erniequant.quantize(micro_ernie, tmp_path / search, search=search, **OPTIONS)
    assert set(searched) == {"cc2"}
    files = [sorted((tmp_path / search).glob("*.safetensors")) for search in ("cpu", "cuda")]
    assert [sha256_of(path) for path in files[0]] == [sha256_of(path) for path in files[1]]


def test_without_a_gpu_one_line_says_so(micro_ernie, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ErnieQuantError, match="--search cuda: torch finds no GPU here; leave it"):
        erniequant.quantize(micro_ernie, tmp_path / "out", search="cuda", **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"search": "gpu"}, "search must be one of cpu, cuda, not 'gpu'"),
        ({"search": "cuda", "format": "fastdeploy-wint2"}, "no codes to search on a GPU"),
    ],
)
def test_what_cannot_be_searched_is_refused(options, complaint, micro_ernie, tmp_path, a_card):
    with pytest.raises(ErnieQuantError, match=complaint):
        erniequant.quantize(micro_ernie, tmp_path / "out", **(OPTIONS | options))
