"""The texts and chats of records.

A record is a text itself, a list of messages, or an object with ``text``, with a chat
(`erniequant.data.chats`), or with a question and an answer under the names that instruction data
sets give them (alpaca: ``instruction``, ``input``, ``output``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erniequant.data.chats import (
    FIELDS,
    chat_of,
    messages_of,
    normal_messages,
    text_of,
    tools_of,
)
from erniequant.errors import ErnieQuantError

_CONTEXT = ("input", "context")
_PAIRS = (
    ("instruction", ("output", "response", "answer")),
    ("prompt", ("completion", "chosen", "response", "output", "answer")),
    ("question", ("answer", "response", "chosen")),
    ("query", ("response", "answer", "output")),
    ("problem", ("solution", "answer")),
    ("input", ("output", "response", "target")),
)
"""The question's field, and the fields that may hold the answer; the first one present counts."""


@dataclass(frozen=True)
class Chat:
    """Messages in our form. ``of_columns``: made from fields that are not a chat, so that they may
    be joined without a template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    of_columns: bool = False

    @property
    def is_empty(self) -> bool:
        """True if no message says anything."""
        return not any(_speaks(message) for message in self.messages)


def texts_and_chats(record: Any, where: str) -> list[str | Chat]:
    """The texts and chats of a record; none if it, or its text, is empty or null.

    Raises:
        ErnieQuantError: its form is unknown.
    """
    if record is None or record == {}:
        return []
    if isinstance(record, str):
        return [record] if record.strip() else []
    if isinstance(record, list | tuple):
        return _spoken(Chat(normal_messages(record, where)))
    if not isinstance(record, Mapping):
        raise ErnieQuantError(f"{where} {_NEITHER}: it is {_shown(record)}")
    text = record.get("text")
    if isinstance(text, str) and text.strip():
        return [text]
    # Data loaders collect texts into batches.
    if isinstance(text, list | tuple) and all(isinstance(t, str | None) for t in text):
        return [entry for entry in text if entry is not None and entry.strip()]
    chat = chat_of_record(record, where)
    if chat is not None:
        return _spoken(chat)
    if is_record(record) and isinstance(text, str | None):
        return []
    raise ErnieQuantError(f"{where} {_NEITHER}{_advice(record)}")


def chat_of_record(record: Mapping[str, Any], where: str) -> Chat | None:
    """The chat of a record, or the one that its columns make.

    Raises:
        ErnieQuantError: it has a chat of an unknown form.
    """
    if chat_of(record) is not None:
        return Chat(messages_of(record, where), tools_of(record, where))
    made = _of_columns(record, where)
    return None if made is None else Chat(made, tools_of(record, where), of_columns=True)


def is_record(value: Mapping[str, Any]) -> bool:
    """True if an object has a field that records have."""
    fields = {"text", "image", "images", "chosen", *FIELDS}
    return bool(fields & set(value)) or any(
        asked in value and any(name in value for name in answers) for asked, answers in _PAIRS
    )


def _of_columns(record: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Messages of a question and an answer; None where there are no such fields."""
    pair = next(
        (
            (asked, answer)
            for asked, answers in _PAIRS
            if record.get(asked)
            for answer in answers
            if record.get(answer)
        ),
        None,
    )
    if pair is None:
        chosen = record.get("chosen")
        if isinstance(chosen, str):
            return [{"role": "assistant", "content": chosen}] if chosen.strip() else None
        return None if not chosen else normal_messages(chosen, where)
    asked, answered = (record[name] for name in pair)
    before = _history(record)
    if not isinstance(answered, str):
        answer = normal_messages(answered, where)
        # Preference data holds the whole chat, or only its last turn.
        if len(answer) > 1:
            return answer
    else:
        answer = [{"role": "assistant", "content": answered}]
    if not isinstance(asked, str):
        return [*before, *normal_messages(asked, where), *answer]
    context = [record.get(name) for name in _CONTEXT if name not in pair]
    texts = [asked, *(text for text in context if isinstance(text, str) and text.strip())]
    return [*before, {"role": "user", "content": "\n".join(texts)}, *answer]


def _history(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system's words and earlier turns beside an instruction."""
    system, history = record.get("system"), record.get("history")
    messages = []
    if isinstance(system, str) and system:
        messages.append({"role": "system", "content": system})
    for turn in history if isinstance(history, list | tuple) else []:
        if isinstance(turn, list | tuple) and len(turn) == 2:
            messages += [
                {"role": role, "content": str(text)}
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
    return messages


def _spoken(chat: Chat) -> list[str | Chat]:
    return [] if chat.is_empty else [chat]


def _speaks(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    has_image = isinstance(content, list) and any(part["type"] == "image" for part in content)
    return has_image or bool(message.get("tool_calls")) or bool(text_of(content).strip())


_NEITHER = 'has neither "text" nor "messages" with role and content'


def _advice(record: Mapping[str, Any]) -> str:
    if "role" in record or "from" in record:
        return ': it is a single message; put those of a chat into {"messages": [...]}'
    if "text" in record:
        return f": its text is {_shown(record['text'])}"
    names = ", ".join(map(str, record)) or "nothing"
    return f' but {names}: rename the field with the text to "text"'


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
