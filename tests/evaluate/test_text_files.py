"""Perplexity of a file: the figures of its text, without ever holding more than is used."""

import gzip
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from erniequant.data import tokens
from erniequant.errors import ErnieQuantError
from erniequant.evaluate import image_perplexity, perplexity

TEXT = "".join(f"line {number}, 文\n" for number in range(400))


class Letters:
    """One token per character; counts those it was asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        self.asked += len(text)
        return {"input_ids": [ord(letter) % 11 for letter in text]}


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 11, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.mark.parametrize("at_most", [None, 100])
def test_a_file_as_its_text(
    path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int | None
) -> None:
    expected = perplexity(Bigram(), Letters(), TEXT, context=64, tokens=at_most)
    assert expected.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    # Many pieces; the hashes are of the same text and tokens.
    monkeypatch.setattr(tokens, "PIECE", 200)
    monkeypatch.setenv("HOME", str(path.parent))
    packed = path.with_suffix(".txt.gz")
    packed.write_bytes(gzip.compress(TEXT.replace("\n", "\r\n").encode("utf-8-sig")))
    for file in (path, packed, Path("~/words.txt")):
        assert perplexity(Bigram(), Letters(), file, context=64, tokens=at_most) == expected


def test_no_more_is_tokenised_than_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 200)
    tokenizer = Letters()
    perplexity(Bigram(), tokenizer, path, tokens=100)
    assert 100 <= tokenizer.asked <= 400
    tokenizer = Letters()
    perplexity(Bigram(), tokenizer, TEXT, tokens=100)
    assert tokenizer.asked <= 400


def test_damage_behind_the_tokens_is_noticed(path: Path) -> None:
    path.write_bytes(b"words\n" * 100 + b"\xff")
    with pytest.raises(ErnieQuantError, match=r"not UTF-8 \(byte 600\)"):
        perplexity(Bigram(), Letters(), path, tokens=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the text is of type NoneType; give one str"),
        (["a", "b"], "the text is of type list"),
        (b"words", "the text is of type bytes"),
        (torch.ones(3), "the text is of type Tensor"),
        ("ab\ud800", "half of a surrogate pair"),
        (Path("no-such-file.txt"), "cannot read no-such-file.txt"),
        ("", "token"),
    ],
)
def test_what_is_no_text_names_itself(text: Any, message: str) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        perplexity(Bigram(), Letters(), text)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, "records is None"),
        (3, "records is an int"),
        (["a"], "records holds texts; give records with images"),
        ([5], r"records\[0\] is an int"),
    ],
)
def test_what_are_no_records_names_itself(records: Any, message: str) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        image_perplexity(Bigram(), Letters(), records)
