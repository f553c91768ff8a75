"""Documents with images: lines of JSONL, rows of a data set.

``{"image": "a.png", "text": "..."}``, ``{"images": ["a.png", "b.png"], "text": "..."}``, or chat
``messages`` whose content lists parts such as ``{"type": "image", "image": "a.png"}`` and
``{"type": "text", "text": "..."}``. Paths are relative to the file that names them. ``<image>`` in
a text says where an image stands; without it, all stand before the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.strict_json import parse_json
from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.inputs import ModelInput, with_pictures
from erniequant.models.images import ImageSettings
from erniequant.paths import expanded
from erniequant.texts import read_text
from erniequant.vision.pictures import PictureReader

MARKER = "<image>"
MIN_TOKENS = 4
"""Of an image; with fewer nothing is seen of it."""

_IMAGE_TYPES = ("image", "image_url")


def read_records(path: Path) -> Iterator[tuple[Any, str]]:
    """The records of a JSONL file, and how to name each in messages.

    Raises:
        ErnieQuantError: the file cannot be read, or a line is not JSON.
    """
    # Not splitlines: JSON may hold other separators, which do not end a line of this format.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield parse_json(line.encode("utf-8")), where
        except ValueError as error:
            raise ErnieQuantError(f"{where} is not JSON: {error}") from error


def has_images(record: Any) -> bool:
    """Whether a record names an image at all."""
    if not isinstance(record, dict):
        return False
    if record.get("image") is not None or record.get("images"):
        return True
    messages = record.get("messages")
    return isinstance(messages, list) and any(
        isinstance(part, dict) and part.get("type") in _IMAGE_TYPES
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


@dataclass(frozen=True)
class ImageTextReader:
    """Turns records with images into what a model is given.

    chat_template: "apply" renders chats with the tokenizer's template, "none" joins their texts.
    length: most tokens of a record, of which images get at most half; text beyond it is cut.
    """

    tokenizer: Any
    images: ImageSettings
    pictures: PictureReader
    chat_template: str = "apply"
    length: int | None = None

    def read(self, record: Any, where: str, folder: Path) -> ModelInput:
        """The input of a record; ``folder`` is what paths are relative to.

        Raises:
            ErnieQuantError: the record is malformed, or an image cannot be read.
        """
        if record.get("messages") is not None:
            ids, sources = self._chat(record["messages"], where, folder, prompt=False)
        else:
            ids, sources = self._plain(_parts_of_text(record, where, folder), where)
        return self._input(ids, sources, where)

    def prompt(self, text: str, images: list[str]) -> ModelInput:
        """The input of a prompt: a user's turn where there is a template to render it with.

        Raises:
            ErnieQuantError: an image cannot be read.
        """
        where = "the prompt"
        if self.chat_template == "apply" and getattr(self.tokenizer, "chat_template", None):
            content = [{"type": "image", "image": image} for image in images]
            turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
            ids, sources = self._chat([turn], where, Path(), prompt=True)
        else:
            parts = [*map(Path, images), text]
            ids, sources = self._tokens_of(parts, where), parts[:-1]
        return self._input(ids, sources, where)

    def _input(self, ids: list[int], sources: list[Any], where: str) -> ModelInput:
        """Token ids with one placeholder for each image, and the images, as one input."""
        share = None if self.length is None else self.length // 2 // max(len(sources), 1)
        if share is not None and share < MIN_TOKENS:
            raise ErnieQuantError(
                f"{where} has {len(sources)} images, too many for {self.length} tokens"
            )
        try:
            pictures = tuple(self.pictures.read(source, share) for source in sources)
            expanded: list[int] = []
            waiting = iter(pictures)
            for token in ids:
                is_image = token == self.images.token
                count = next(waiting).tokens(self.images.merge) if is_image else 1
                expanded += [token] * count
            return with_pictures(torch.tensor(expanded[: self.length]), pictures, self.images)
        except ErnieQuantError as error:
            raise ErnieQuantError(f"{where}: {error}") from error

    def _plain(self, parts: list[str | Any], where: str) -> tuple[list[int], list[Any]]:
        """Token ids with one placeholder for each image, and the images."""
        ids = self._tokens_of(parts, where)
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return ids, [part for part in parts if not isinstance(part, str)]

    def _tokens_of(self, parts: list[str | Any], where: str) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                ids += self._tokens(part, where)
            else:
                ids += [self.images.start_token, self.images.token, self.images.end_token]
        return ids

    def _chat(
        self, messages: Any, where: str, folder: Path, prompt: bool
    ) -> tuple[list[int], list[Any]]:
        turns: list[dict[str, Any]] = []
        joined: list[Any] = []
        sources: list[Any] = []
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ErnieQuantError(f"{where} has messages that are not a list of objects")
        for message in messages:
            parts = _parts_of_message(message, where, folder)
            sources += [part for part in parts if not isinstance(part, str)]
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in parts
            ]
            turns.append({"role": message["role"], "content": content})
            joined += [*parts, "\n"]
        if self.chat_template == "none":
            return self._plain(joined[:-1], where)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ErnieQuantError(
                f"{where} holds chat messages but the tokenizer has no chat template; use "
                "--chat-template none"
            )
        with foreign_errors(f"{where}: the chat template cannot render its messages"):
            text = str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=prompt
                )
            )
        ids = self._tokens(text, where)
        if ids.count(self.images.token) != len(sources):
            raise ErnieQuantError(
                f"{where}: the chat template writes {ids.count(self.images.token)} image tokens "
                f"for {len(sources)} images; use --chat-template none"
            )
        return ids, sources

    def _tokens(self, text: str, where: str) -> list[int]:
        with foreign_errors(f"{where}: the tokenizer cannot read its text"):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _parts_of_text(record: dict[str, Any], where: str, folder: Path) -> list[Any]:
    """Texts and images of a record, in order."""
    given = record["images"] if record.get("images") else [record.get("image")]
    text = record.get("text")
    if not isinstance(given, list) or not isinstance(text, str):
        raise ErnieQuantError(f'{where} has images but no "text" beside them')
    sources = [_image(value, where, folder) for value in given]
    pieces = text.split(MARKER)
    if len(pieces) == 1:
        return [*sources, text]
    if len(pieces) != len(sources) + 1:
        raise ErnieQuantError(
            f"{where} has {len(sources)} images, but {MARKER} {len(pieces) - 1} times in its text"
        )
    parts: list[Any] = [pieces[0]]
    for source, piece in zip(sources, pieces[1:], strict=True):
        parts += [source, piece]
    return [part for part in parts if part != ""]


def _parts_of_message(message: dict[str, Any], where: str, folder: Path) -> list[Any]:
    if not isinstance(message.get("role"), str):
        raise ErnieQuantError(f"{where} has a message without role; expected role and content")
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise ErnieQuantError(f"{where} has a message without content")
    parts: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind in _IMAGE_TYPES:
            value = part.get(kind, part.get("path", part.get("url")))
            value = value.get("url") if isinstance(value, dict) else value
            parts.append(_image(value, where, folder))
        else:
            raise ErnieQuantError(f"{where} has a part of type {kind!r}; use text and image")
    return parts


def _image(value: Any, where: str, folder: Path) -> Any:
    """The path of an image, or the image itself where a data set brings it along."""
    if hasattr(value, "convert"):
        return value
    if not isinstance(value, str) or not value:
        raise ErnieQuantError(f"{where} has an image that is not a path: {str(value)[:60]!r}")
    if "://" in value or value.startswith("data:"):
        raise ErnieQuantError(
            f"{where} has the image {value[:60]!r}; give files on this machine, as paths"
        )
    return folder / expanded(value)
