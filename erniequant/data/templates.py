"""Chats to text by a tokenizer's template, in the form that this template can render.

Most templates want the content of a message as one text, those of vision-language models also as
parts; some know tool calls and some do not. Nothing says which, so forms are tried in turn.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from erniequant.checkpoint.strict_json import parse_json
from erniequant.data.chats import calls_as_text, parts_of, text_of
from erniequant.data.documents import Chat
from erniequant.errors import ErnieQuantError, wrap_errors

Messages = list[dict[str, Any]]


def render(chat: Chat, tokenizer: Any, mode: str, where: str) -> str:
    """The text of a chat without images.

    Args:
        mode: ``apply`` renders it with the tokenizer's template, ``none`` joins the contents with
            line ends. Without a template, questions and answers of columns are joined too.

    Raises:
        ErnieQuantError: there is no template, or it cannot render the chat.
    """
    template = getattr(tokenizer, "chat_template", None)
    if mode == "none" or (chat.of_columns and not template):
        return "\n".join(text_of(message["content"]) for message in for_template(chat.messages))
    require_template(tokenizer, where)
    failure: ErnieQuantError | None = None
    first: str | None = None
    said = [text_of(m["content"]).strip() for m in chat.messages if m["role"] == "user"]
    for form in _forms(chat.messages, str(template)):
        try:
            text = apply_template(tokenizer, form, where, tools=chat.tools)
        except ErnieQuantError as error:
            failure = failure or error
            continue
        # A loop over the parts of a content runs over the letters of a text, and writes nothing.
        if all(words in text for words in said):
            return text
        first = text if first is None else first
    if first is None:
        assert failure is not None
        raise failure
    return first


def require_template(tokenizer: Any, where: str) -> None:
    """Raises ErnieQuantError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ErnieQuantError(
            f"{where} holds chat messages but the tokenizer has no chat template; use "
            "--chat-template none"
        )


def apply_template(
    tokenizer: Any, messages: Messages, where: str, *, tools: list[Any] | None = None, **more: Any
) -> str:
    """The tokenizer's template on messages in a form of its own.

    Raises:
        ErnieQuantError: it cannot render them.
    """
    if tools is not None:
        more["tools"] = tools
    with wrap_errors(f"{where}: the chat template cannot render its messages"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))


def for_template(messages: Messages, template: str = "") -> Messages:
    """Messages with tool calls in the form that the template knows."""
    converted = [_with_objects(message) for message in messages]
    return (
        converted if "tool_calls" in template else [calls_as_text(message) for message in converted]
    )


def _forms(messages: Messages, template: str) -> Iterator[Messages]:
    converted = for_template(messages, template)
    yield [{**message, "content": text_of(message["content"])} for message in converted]
    if converted != messages and "tool_calls" in template:
        # Some templates want the arguments of a call as text.
        yield [{**message, "content": text_of(message["content"])} for message in messages]
    yield [{**message, "content": parts_of(message["content"])} for message in converted]


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with arguments of calls as objects, as transformers recommends; OpenAI writes
    them as JSON text, which templates would quote again."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            with suppress(ValueError):  # what is no JSON stays a text
                function = {**function, "arguments": parse_json(arguments.encode("utf-8"))}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}
