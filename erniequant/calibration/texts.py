"""Calibration text: from the built-in collection, a file, JSONL or a data set to windows of token
ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.strict_json import parse_json
from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.texts import hash_token_ids, read_text

SURPLUS = 16
"""Reading stops at this many times the tokens asked for; a random choice of windows needs no
more."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text to calibrate on, and how much of it.

    ``source`` is ``builtin``, a path ending in .txt or .jsonl, or ``hf:NAME[:SPLIT[:COLUMN]]``.
    ``chat_template`` ``apply`` renders chat ``messages`` with the model's template, ``none`` joins
    their contents.
    """

    source: str = "builtin"
    samples: int = 128
    length: int = 1024
    chat_template: str = "apply"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise ErnieQuantError("calibration needs at least 1 sample of at least 2 tokens")
        if self.chat_template not in ("apply", "none"):
            raise ErnieQuantError(
                f"chat template must be apply or none, not {self.chat_template!r}"
            )


@dataclass(frozen=True, eq=False)
class CalibrationWindows:
    """Windows of token ids, int64 ``[T]`` each, and where they came from.

    ``sha256`` is `hash_token_ids` of all of them; ``rendered`` shows the start of the
    first document.
    """

    windows: tuple[torch.Tensor, ...]
    sha256: str
    rendered: str

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(window.numel() for window in self.windows)


def calibration_windows(tokenizer: Any, config: CalibrationConfig) -> CalibrationWindows:
    """Tokenise the source, cut it into windows of ``config.length`` and choose ``config.samples``
    of them.

    Documents follow one another, separated by the end-of-text token where the tokenizer has one;
    no BOS is added. A source shorter than one window yields one shorter window.

    Raises:
        ErnieQuantError: the source cannot be read, or holds no text.
    """
    wanted = config.samples * config.length * SURPLUS
    ids: list[int] = []
    rendered = ""
    for document in documents(config, tokenizer):
        rendered = rendered or document[:400]
        with foreign_errors(f"the tokenizer cannot read {config.source}"):
            ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= wanted:
            break
    if len(ids) < 2:
        raise ErnieQuantError(
            f"calibration text {config.source} holds no text; give another source"
        )
    stream = torch.tensor(ids)
    count = max(len(ids) // config.length, 1)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(count, generator=generator)[: config.samples].sort().values
    windows = tuple(stream[i * config.length : (i + 1) * config.length] for i in chosen.tolist())
    return CalibrationWindows(windows, hash_token_ids(torch.cat(windows)), rendered)


def documents(config: CalibrationConfig, tokenizer: Any) -> Iterator[str]:
    """The documents of a source, chat messages rendered."""
    source = config.source
    if source == "builtin":
        from erniequant_data import calibration_text

        yield calibration_text()
    elif source.startswith("hf:"):
        yield from _dataset(source, config, tokenizer)
    elif source.endswith(".jsonl"):
        yield from _jsonl(Path(source), config, tokenizer)
    elif source.endswith(".txt"):
        yield read_text(Path(source))
    else:
        raise ErnieQuantError(
            f"calibration source {source!r} is none of builtin, FILE.txt, FILE.jsonl, "
            "hf:NAME[:SPLIT[:COLUMN]]"
        )


def _jsonl(path: Path, config: CalibrationConfig, tokenizer: Any) -> Iterator[str]:
    # Not splitlines: JSON may hold other separators, which do not end a line of this format.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = parse_json(line.encode("utf-8"))
        except ValueError as error:
            raise ErnieQuantError(f"{where} is not JSON: {error}") from error
        yield render(record, config, tokenizer, where)


def _dataset(source: str, config: CalibrationConfig, tokenizer: Any) -> Iterator[str]:
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the data set library raises many unrelated types
        reason = " ".join(str(error).split())
        raise ErnieQuantError(f"cannot load data set {name}: {reason}") from error
    for number, row in enumerate(rows):
        record = {"text": row[column]} if column and column in row else row
        yield render(record, config, tokenizer, f"data set {name} row {number}")


def render(record: Any, config: CalibrationConfig, tokenizer: Any, where: str) -> str:
    """One document of a record with ``text`` or chat ``messages``.

    Raises:
        ErnieQuantError: neither field is there, or there is no template to render messages with.
    """
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise ErnieQuantError(f'{where} has neither "text" nor "messages" with role and content')
    if config.chat_template == "none":
        return "\n".join(message["content"] for message in messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ErnieQuantError(
            f"{where} holds chat messages but the tokenizer has no chat template; use "
            "--chat-template none"
        )
    with foreign_errors(f"{where}: the chat template cannot render its messages"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
