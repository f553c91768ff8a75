"""Documents with images: records of files, rows of a data set.

``{"image": "a.png", "text": "..."}``, ``{"images": ["a.png", "b.png"], "text": "..."}``, or a chat
whose content lists parts such as ``{"type": "image", "image": "a.png"}`` and ``{"type": "text",
"text": "..."}``, or with its images beside it. Paths are relative to the file that names them.
``<image>`` in a text says where an image stands; without it, all stand before the text, or the
first turn of the user.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from erniequant.data.chats import IMAGE_TYPES, chat_of, parts_of
from erniequant.data.documents import Chat, chat_of_record
from erniequant.data.images import ImageReader
from erniequant.data.inputs import ImagePatches, ModelInput, input_with_images
from erniequant.data.templates import apply_template, for_template, require_template
from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.models.images import ImageSettings
from erniequant.paths import expanded

MARKER = "<image>"
MIN_TOKENS = 4
"""Fewest tokens of an image; with fewer, nothing in it can be made out."""


def has_images(record: Any) -> bool:
    """True if a record names an image."""
    if not isinstance(record, Mapping):
        return False
    if record.get("image") is not None or record.get("images"):
        return True
    messages = chat_of(record)
    return isinstance(messages, list | tuple) and any(
        isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        for part in message["content"]
    )


@dataclass(frozen=True)
class ImageTextReader:
    """Turns records with images into model inputs.

    chat_template: "apply" renders chats with the tokenizer's template, "none" joins their texts.
    length: most tokens of a record, of which images get at most half; text beyond it is cut.
    """

    tokenizer: Any
    settings: ImageSettings
    image_reader: ImageReader
    chat_template: str = "apply"
    length: int | None = None

    def read(self, record: Any, where: str, folder: Path) -> ModelInput:
        """The input of a record; ``folder`` is what paths are relative to.

        Raises:
            ErnieQuantError: the record is malformed, or an image cannot be read.
        """
        spoken = chat_of(record) is not None or record.get("text") is None
        chat = chat_of_record(record, where) if spoken else None
        if chat is not None:
            ids, sources = self._chat(with_images(chat, record, where), where, folder)
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
            ids, sources = self._chat(Chat([turn]), where, Path(), prompt=True)
        else:
            parts = [*map(Path, images), text]
            ids, sources = self._tokens_of(parts, where), parts[:-1]
        return self._input(ids, sources, where)

    def chat(self, messages: list[dict[str, Any]]) -> ModelInput:
        """The input of a chat that the model is to answer.

        messages: in transformers' form; image parts hold a path, or an image that was read before
            (`ImagePatches`).

        Raises:
            ErnieQuantError: the chat template cannot render it, or an image cannot be read.
        """
        where = "the chat"
        ids, sources = self._chat(Chat(messages), where, Path(), prompt=True)
        return self._input(ids, sources, where)

    def _input(self, ids: list[int], sources: list[Any], where: str) -> ModelInput:
        """Token ids with one placeholder for each image, and the images, as one input."""
        share = None if self.length is None else self.length // 2 // max(len(sources), 1)
        if share is not None and share < MIN_TOKENS:
            raise ErnieQuantError(
                f"{where} has {len(sources)} images, too many for {self.length} tokens"
            )
        try:
            images = tuple(
                source
                if isinstance(source, ImagePatches)
                else self.image_reader.read(source, share)
                for source in sources
            )
            expanded: list[int] = []
            waiting = iter(images)
            for token in ids:
                is_image = token == self.settings.token
                count = next(waiting).tokens(self.settings.merge) if is_image else 1
                expanded += [token] * count
            return input_with_images(torch.tensor(expanded[: self.length]), images, self.settings)
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
                ids += [self.settings.start_token, self.settings.token, self.settings.end_token]
        return ids

    def _chat(
        self, chat: Chat, where: str, folder: Path, prompt: bool = False
    ) -> tuple[list[int], list[Any]]:
        template = getattr(self.tokenizer, "chat_template", None)
        joins = self.chat_template == "none" or (chat.of_columns and not template)
        turns: list[dict[str, Any]] = []
        joined: list[Any] = []
        sources: list[Any] = []
        for message in for_template(chat.messages, "" if joins else str(template)):
            content = parts_of(message["content"])
            parts = [
                part["text"] if part["type"] == "text" else _image(part["image"], where, folder)
                for part in content
            ]
            sources += [part for part in parts if not isinstance(part, str)]
            # A template may take an image's path for something to write.
            shown = [part if part["type"] == "text" else {"type": "image"} for part in content]
            turns.append({**message, "content": shown})
            joined += [*parts, "\n"]
        if joins:
            return self._plain(joined[:-1], where)
        require_template(self.tokenizer, where)
        text = apply_template(
            self.tokenizer, turns, where, tools=chat.tools, add_generation_prompt=prompt
        )
        ids = self._tokens(text, where)
        if ids.count(self.settings.token) != len(sources):
            raise ErnieQuantError(
                f"{where}: the chat template writes {ids.count(self.settings.token)} image tokens "
                f"for {len(sources)} images; use --chat-template none"
            )
        return ids, sources

    def _tokens(self, text: str, where: str) -> list[int]:
        with wrap_errors(f"{where}: the tokenizer cannot read its text"):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def with_images(chat: Chat, record: Mapping[str, Any], where: str) -> Chat:
    """The chat with the images that the record lists beside it put into its messages: at `MARKER`,
    at image parts that name no image, or else before the user's first words.

    Raises:
        ErnieQuantError: there are more or fewer places than images.
    """
    beside = _images_of(record, where)
    if not beside:
        return chat
    contents = [parts_of(message["content"]) for message in chat.messages]
    pieces = [[piece for part in parts for piece in _at_markers(part)] for parts in contents]
    places = [part for parts in pieces for part in parts if _is_place(part)]
    if not places:
        roles = [message["role"] for message in chat.messages]
        first = roles.index("user") if "user" in roles else 0
        places = [{"type": "image", "image": None} for _ in beside]
        pieces[first : first + 1] = [[*places, *part] for part in pieces[first : first + 1]]
    if len(places) != len(beside):
        raise ErnieQuantError(
            f"{where} has {len(beside)} images, but {MARKER} {len(places)} times in its messages"
        )
    waiting = iter(beside)
    return replace(
        chat,
        messages=[
            {
                **message,
                "content": [
                    {"type": "image", "image": next(waiting)} if _is_place(part) else part
                    for part in parts
                ],
            }
            for message, parts in zip(chat.messages, pieces, strict=True)
        ],
    )


def _is_place(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image" and part["image"] is None


def _at_markers(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The part, cut where images stand in its text."""
    if part["type"] != "text" or MARKER not in part["text"]:
        return [part]
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(part["text"].split(MARKER)):
        parts += [{"type": "image", "image": None}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _images_of(record: Mapping[str, Any], where: str) -> list[Any]:
    given = record["images"] if record.get("images") else [record.get("image")]
    # Some data sets call a list of images "image".
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list | tuple):
        given = list(given[0])
    if not isinstance(given, list | tuple):
        raise ErnieQuantError(f"{where} has images that are not a list")
    return [image for image in given if image is not None]


def _parts_of_text(record: Mapping[str, Any], where: str, folder: Path) -> list[Any]:
    """Texts and images of a record, in order."""
    text = record.get("text")
    if not isinstance(text, str):
        raise ErnieQuantError(f'{where} has images but no "text" beside them')
    sources = [_image(value, where, folder) for value in _images_of(record, where)]
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


def _image(value: Any, where: str, folder: Path) -> Any:
    """The path of an image, or the image itself where it was read before, or where a data set
    brings it along."""
    if hasattr(value, "convert") or isinstance(value, ImagePatches):
        return value
    if isinstance(value, Mapping) and value.get("bytes"):
        value = value["bytes"]
    if isinstance(value, bytes):
        return _decoded(value, where)
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, Path):
        return folder / value.expanduser()
    if not isinstance(value, str) or not value:
        raise ErnieQuantError(f"{where} has an image that is not a path: {str(value)[:60]!r}")
    if "://" in value or value.startswith("data:"):
        raise ErnieQuantError(
            f"{where} has the image {value[:60]!r}; give files on this machine, as paths"
        )
    return folder / expanded(value)


def _decoded(data: bytes, where: str) -> Any:
    from PIL import Image

    with wrap_errors(f"{where}: cannot read its image"):
        return Image.open(io.BytesIO(data))
