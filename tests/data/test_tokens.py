"""Long texts have the same token ids in pieces as whole, and no tokenizer sees them whole."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import erniequant_data
from erniequant.data import tokens
from erniequant.data.tokenizers import load_tokenizer
from erniequant.data.tokens import BEHIND, PIECE, pieces, token_ids
from erniequant.errors import ErnieQuantError


class Counting:
    """A tokenizer that remembers the longest text it was given."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.longest = self.calls = 0

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        self.longest = max(self.longest, len(text))
        self.calls += 1
        return self._tokenizer(text, add_special_tokens=add_special_tokens)


def with_prefix() -> Any:
    """Puts a space before the first word of every text, as sentencepiece does."""
    words = {"<unk>": 0, "▁": 1, "▁one": 2, "one": 3, "▁two": 4, "two": 5, "▁one\n": 6}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def text_of(kind: str) -> str:
    return {
        "paragraphs": erniequant_data.calibration_text()[:40_000],
        # Without a line end, a piece ends at a word.
        "one line": erniequant_data.calibration_text("en")[:30_000].replace("\n", " "),
        # Without spaces as well, anywhere.
        "one word": "".join(erniequant_data.calibration_text("zh")[:20_000].split()),
        "blank lines": "one\n\n\n\n  two " * 1500,
    }[kind]


@pytest.mark.parametrize(
    ("which", "kind"),
    [(w, k) for k in ("paragraphs", "one line", "blank lines") for w in ("tiny", "prefix")]
    + [("tiny", "one word")],
)
def test_in_pieces_as_whole(monkeypatch: pytest.MonkeyPatch, which: str, kind: str) -> None:
    monkeypatch.setattr(tokens, "PIECE", 3000)
    tokenizer = (
        load_tokenizer(erniequant_data.tiny_model_dir()) if which == "tiny" else with_prefix()
    )
    text = text_of(kind)
    whole = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    counting = Counting(tokenizer)
    found = token_ids(counting, [text[:100], text[100:9000], text[9000:]])
    assert counting.longest <= 2 * 3000 + BEHIND and counting.calls > 6
    if kind == "one word":
        # A word is cut somewhere, and its halves may be other tokens.
        assert tokenizer.decode(found) == tokenizer.decode(whole)
        assert abs(len(found) - len(whole)) <= 2 * len(text) // 3000
    else:
        assert torch.equal(found, whole)
    assert found.dtype == torch.int64


def test_no_more_is_read_than_asked_for() -> None:
    taken: list[int] = []

    def parts() -> Any:
        for number in range(100):
            taken.append(number)
            yield "some words\n" * 10_000

    counting = Counting(lambda text, add_special_tokens: {"input_ids": list(map(ord, text))})
    found = token_ids(counting, parts(), at_most=1000)
    assert found.tolist() == list(map(ord, ("some words\n" * 100)[:1000]))
    assert len(taken) * 110_000 <= 2 * PIECE + 110_000 and counting.longest <= 2 * PIECE


def test_pieces_lose_nothing_and_end_where_lines_end() -> None:
    text = "ab cd\n\n\nef gh\n" * 40
    for size in (7, 10, 64):
        found = list(pieces([text], size))
        assert "".join(found) == text
        assert all(len(piece) <= 2 * size for piece in found)
        # Never within a run of line ends, which are one token.
        ends = list(zip(found, found[1:], strict=False))
        assert not any(a.endswith("\n") and b.startswith("\n") for a, b in ends)


def test_nothing_gives_nothing() -> None:
    assert token_ids(None, []).tolist() == token_ids(None, [""]).tolist() == []


def test_half_of_a_pair_is_refused() -> None:
    with pytest.raises(ErnieQuantError, match="half of a surrogate pair at character 2"):
        token_ids(with_prefix(), ["ab\ud800"])
