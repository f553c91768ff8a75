"""Chats in the forms in which they are shared, as messages in one form.

Here a message has ``role``, ``content`` (a text, or a list of parts ``{"type": "text", "text": …}``
and ``{"type": "image", "image": …}``), and whatever else its template may use: ``tool_calls``,
``name``, ``tool_call_id``. Known forms are OpenAI's, with parts and tool calls, ShareGPT's, with
``from`` and ``value``, and pairs of a question and an answer.
"""

import json
from collections.abc import Mapping
from typing import Any

from erniequant.checkpoint.strict_json import parse_json
from erniequant.errors import ErnieQuantError

FIELDS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
"""Names of the field that holds a chat."""

IMAGE_TYPES = ("image", "image_url", "input_image")
_TEXT_TYPES = ("text", "input_text", "output_text")

# Names in ShareGPT's ``from``; other names are roles already.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "observation": "tool", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
# Whatever writes ``role`` means it, except for these two, which no template knows.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_CALLS = ("function_call", "tool_call")
# Fields of turns that hold a question and its answer.
_ASKED = ("human", "user", "input", "question")
_ANSWERED = ("assistant", "gpt", "bot", "output", "answer")


def chat_of(record: Any) -> Any:
    """The value of a record's chat field; None without one."""
    if not isinstance(record, Mapping):
        return None
    chats = [record[name] for name in FIELDS if record.get(name) is not None]
    return chats[0] if chats else None


def messages_of(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of a record with a chat, in our form.

    Raises:
        ErnieQuantError: their form is unknown.
    """
    messages = normal_messages(chat_of(record), where)
    system = record.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def normal_messages(chat: Any, where: str) -> list[dict[str, Any]]:
    """Messages in our form; tables hold them as JSON text.

    Raises:
        ErnieQuantError: their form is unknown.
    """
    if isinstance(chat, str):
        chat = _parsed(chat)
    if hasattr(chat, "tolist"):
        chat = chat.tolist()  # an array of objects, as pandas has them
    if not isinstance(chat, list | tuple) or not all(isinstance(m, Mapping) for m in chat):
        raise ErnieQuantError(f"{where} has messages that are not a list of objects")
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(chat, start=1):
        # Tables give every message every field; absent ones are null.
        present = {key: value for key, value in message.items() if value is not None}
        if "role" in present or "from" in present:
            messages.append(_message(message, present, f"{where} has", number))
        else:
            messages += _pair(present, where)
    return messages


def tools_of(record: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools that a chat may call, or None.

    Raises:
        ErnieQuantError: they are not a list.
    """
    tools, functions = record.get("tools"), record.get("functions")
    if isinstance(tools, str):
        tools = _parsed(tools) if tools.strip() else None
    if not tools and isinstance(functions, list):
        return [{"type": "function", "function": function} for function in functions] or None
    if tools is not None and not isinstance(tools, list):
        raise ErnieQuantError(f"{where} has tools that are not a list")
    return tools or None


def parts_of(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text of a message's content; images are left out."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its tool calls as JSON in its text, for templates that know no tools."""
    if "tool_calls" not in message:
        return message
    calls = [call.get("function", call) for call in message["tool_calls"]]
    text = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    content = message["content"]
    if isinstance(content, str):
        return {**rest, "content": f"{content}\n{text}" if content else text}
    return {**rest, "content": [*content, {"type": "text", "text": text}]}


def _message(
    given: Mapping[str, Any], message: dict[str, Any], has: str, number: int
) -> dict[str, Any]:
    """One message; ``message`` is ``given`` without what is null."""
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise ErnieQuantError(f"{has} a message without role; expected role and content")
    kept = {k: v for k, v in message.items() if k not in _SPOKEN}
    calls = _calls(message, f"{has} message {number}")
    content = message.get("content", message.get("value"))
    if "role" in message:
        normal_role = _SHAREGPT_ROLES.get(role, role)
    else:
        normal_role = _ROLES.get(role.lower(), role.lower())
        if role in _CALLS and isinstance(content, str):
            called = _called(content)
            calls, content = called or calls, None if called else content
    if content is None and not calls and not {"content", "value"} & set(given):
        raise ErnieQuantError(
            f'{has.removesuffix(" has")} has neither "text" nor "messages" with role and content: '
            f"message {number} has no content"
        )
    normal = {"role": normal_role, "content": _content(content, has), **kept}
    return {**normal, "tool_calls": calls} if calls else normal


_SPOKEN = ("role", "from", "content", "value", "tool_calls", "function_call")


def _content(content: Any, has: str) -> str | list[dict[str, Any]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if hasattr(content, "tolist"):
        content = content.tolist()
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        raise ErnieQuantError(
            f"{has} a message whose content is neither a text nor a list of parts"
        )
    return [part for part in (_part(part, has) for part in content) if part is not None]


def _part(part: Any, has: str) -> dict[str, Any] | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _TEXT_TYPES and part.get("text") is None:
        return None
    if kind in IMAGE_TYPES:
        names = (kind, "image", "image_url", "path", "url")
        value = next((part[name] for name in names if part.get(name) is not None), None)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        return {"type": "image", "image": value}
    raise ErnieQuantError(f"{has} a part of type {kind!r}; use text and image")


def _calls(message: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    calls: Any = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _parsed(calls)
    if not calls and "function_call" in message:
        calls = [{"type": "function", "function": message["function_call"]}]
    if hasattr(calls, "tolist"):
        calls = calls.tolist()
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ErnieQuantError(f"{what} with tool_calls that are not a list of objects")
    return [dict(call) for call in calls]


def _called(text: str) -> list[dict[str, Any]]:
    """Tool calls written as the text of a message."""
    value = _parsed(text)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _pair(turn: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A question and its answer, perhaps with the system's words before them."""
    turns = [("system", turn.get("system"))]
    for role, names in (("user", _ASKED), ("assistant", _ANSWERED)):
        turns.append((role, next((turn[name] for name in names if name in turn), None)))
    messages = [{"role": role, "content": text} for role, text in turns if isinstance(text, str)]
    if not messages:
        raise ErnieQuantError(f"{where} has a message without role; expected role and content")
    return messages


def _parsed(text: str) -> Any:
    """The value of JSON text; None for any other value."""
    try:
        return parse_json(text.encode("utf-8", "replace"))
    except ValueError:
        return None
