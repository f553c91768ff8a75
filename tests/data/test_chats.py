"""Chats in every form that is shared, through templates of every kind; the tokenizer is jinja
alone, so renderings can be read."""

import json
from typing import Any

import pytest

from erniequant.data.documents import Chat, texts_and_chats
from erniequant.data.templates import render
from erniequant.errors import ErnieQuantError

STRINGS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '' }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content + '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}"
)
# Fails on arguments that are an object.
TOOLS_AS_TEXT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content + '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
)


class Jinja:
    """A tokenizer of which only the template is asked."""

    def __init__(self, template: str | None):
        self.chat_template = template

    def apply_chat_template(self, messages: Any, tokenize: bool, **more: Any) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        assert not tokenize
        template = ImmutableSandboxedEnvironment().from_string(str(self.chat_template))
        return template.render(messages=messages, **more)


def rendered(record: Any, template: str | None = STRINGS, mode: str = "apply") -> str:
    (chat,) = texts_and_chats(record, "line 1")
    return chat if isinstance(chat, str) else render(chat, Jinja(template), mode, "line 1")


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


HI, YO = {"type": "text", "text": "hi"}, {"type": "output_text", "text": "yo"}
PLAIN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


@pytest.mark.parametrize("template", [STRINGS, PARTS, EITHER, TOOLS])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": PLAIN},
        PLAIN,
        {"messages": json.dumps(PLAIN)},
        {"messages": [turn("user", HI), turn("assistant", YO)]},
        {"messages": [turn("user", "h", {"type": "input_text", "text": "i"}), PLAIN[1]]},
        {"messages": [{"role": "user", "content": HI}, PLAIN[1]]},
        # Tables give every part every field.
        {"messages": [turn("user", {"type": "text", "text": None}, {**HI, "image": None}),
                      {**PLAIN[1], "tool_calls": None, "name": None}], "text": None, "tools": None},
        {"conversations": SHAREGPT},
        {"conversation": SHAREGPT, "id": 3},
        {"messages": SHAREGPT, "text": ""},
        {"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "yo"}]},
        {"conversation": [{"human": "hi", "assistant": "yo"}]},
        {"conversation": [{"input": "hi", "output": "yo", "system": None}]},
        {"instruction": "hi", "input": "", "output": "yo"},
        {"instruction": "hi", "context": None, "response": "yo", "category": "qa"},
        {"prompt": "hi", "completion": "yo"},
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
        {"prompt": PLAIN[:1], "chosen": PLAIN[1:], "rejected": PLAIN[1:]},
        {"prompt": "hi", "chosen": PLAIN, "rejected": PLAIN},
        {"chosen": PLAIN, "rejected": PLAIN},
        {"question": "hi", "answer": "yo"},
        {"query": "hi", "response": "yo"},
        {"input": "hi", "output": "yo"},
    ],
)  # fmt: skip
def test_forms(record: Any, template: str) -> None:
    assert rendered(record, template) == "<user>hi<assistant>yo"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a", "messages": PLAIN}, "a"),
        ("a text", "a text"),
        ({"instruction": "do", "input": "this", "output": "ok", "system": "be",
          "history": [["q", "a"]]}, "<system>be<user>q<assistant>a<user>do\nthis<assistant>ok"),
        ({"system": "be", "conversations": SHAREGPT}, "<system>be<user>hi<assistant>yo"),
        # Whatever writes role means it.
        ({"messages": [{"role": "bot", "content": "x"}]}, "<bot>x"),
        ({"conversations": [{"from": "System", "value": "x"}]}, "<system>x"),
        ({"messages": [{"role": "user", "content": None}, {"role": "a", "content": "x"}]},
         "<user><a>x"),
    ],
)  # fmt: skip
def test_other_forms(record: Any, expected: str) -> None:
    assert rendered(record) == expected


ARGUMENTS = {"city": "文"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
CALL_AS_TEXT = {**CALL, "function": {"name": "f", "arguments": json.dumps(ARGUMENTS)}}
ANSWER = {"role": "tool", "tool_call_id": "1", "name": "f", "content": "sun"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, ANSWER]},
        {"messages": [{"role": "assistant", "tool_calls": [CALL_AS_TEXT]}, ANSWER]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
                      {"role": "tool", "content": [{"type": "text", "text": "sun"}]}]},
        {"messages": [{"role": "assistant", "content": None,
                       "function_call": CALL_AS_TEXT["function"]}, ANSWER]},
        {"conversations": [
            {"from": "function_call", "value": json.dumps({"name": "f", "arguments": ARGUMENTS})},
            {"from": "observation", "value": "sun"}]},
    ],
)  # fmt: skip
def test_calls_of_tools(record: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        shown = rendered({**record, "tools": given}, TOOLS)
        # Jinja writes the character as an escape.
        assert shown == '[f]<assistant>f{"city": "\\u6587"}<tool>sun'
    assert rendered({**record, "functions": [{"name": "f"}]}, TOOLS).startswith("[f]")
    # A template that knows no tools still says what is called, once.
    for shown in (rendered(record), rendered(record, mode="none")):
        assert shown.count('"name": "f"') == 1 and "文" in shown and shown.endswith("sun")


def test_arguments_as_the_template_wants_them() -> None:
    record = {"messages": [{"role": "a", "content": "x", "tool_calls": [CALL_AS_TEXT]}]}
    assert rendered(record, TOOLS_AS_TEXT) == "<a>xf" + json.dumps(ARGUMENTS)


@pytest.mark.parametrize(
    "record",
    [
        None, "", " \n", [], {}, {"text": ""}, {"text": " \r\n "}, {"text": None},
        {"text": None, "messages": None}, {"messages": []}, {"messages": None}, {"text": []},
        {"messages": [{"role": "user", "content": ""}, {"role": "a", "content": None}]},
        {"messages": [turn("user")]}, {"instruction": "", "input": "", "output": ""},
        {"conversations": [{"from": "human", "value": " "}]}, {"prompt": None, "completion": None},
    ],
)  # fmt: skip
def test_empty_records_say_nothing(record: Any) -> None:
    assert texts_and_chats(record, "line 1") == []


def test_batches_of_texts() -> None:
    # As a DataLoader puts records together.
    assert texts_and_chats({"text": ["a", "", None, "b"]}, "line 1") == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 3}, 'line 1 has neither "text" nor "messages".*its text is 3'),
        (3, 'line 1 has neither "text" nor "messages".*it is 3'),
        ({"body": "x", "id": 1}, 'but body, id: rename the field with the text to "text"'),
        ({"role": "user", "content": "x"}, "single message; put those of a chat into"),
        ({"messages": "hello"}, "messages that are not a list of objects"),
        ({"messages": {"role": "x"}}, "messages that are not a list of objects"),
        ({"messages": [{"content": "x"}]}, "a message without role"),
        ({"messages": [{"role": 1, "content": "x"}]}, "a message without role"),
        ({"messages": [{"role": "user"}]}, 'neither "text" nor "messages".*message 1 has no conte'),
        ({"messages": [{"role": "user", "content": 3}]}, "neither a text nor a list of parts"),
        ({"messages": [turn("user", {"type": "audio"})]}, "a part of type 'audio'"),
        ({"messages": [{"role": "a", "tool_calls": 3}]}, "message 1 with tool_calls that are not"),
        ({"messages": PLAIN, "tools": "x y"}, None),
        ({"messages": PLAIN, "tools": {"a": 1}}, "tools that are not a list"),
    ],
)
def test_what_is_no_record_is_named(record: Any, message: str | None) -> None:
    if message is None:
        # Words that are no JSON name no tool.
        assert rendered(record) == "<user>hi<assistant>yo"
        return
    with pytest.raises(ErnieQuantError, match=message):
        texts_and_chats(record, "line 1")


def test_without_a_template() -> None:
    with pytest.raises(ErnieQuantError, match="no chat template; use --chat-template none"):
        rendered({"messages": PLAIN}, None)
    # Columns are no chat: they are texts that belong together.
    assert rendered({"instruction": "hi", "output": "yo"}, None) == "hi\nyo"


def test_a_broken_template_is_one_line() -> None:
    with pytest.raises(ErnieQuantError, match="line 1: the chat template cannot render") as error:
        rendered(
            {"messages": PLAIN}, "{% for m in messages %}{{ m.content.nothing() }}{% endfor %}"
        )
    assert "\n" not in str(error.value)
    # One that drops the user's words is taken as it is, if no form helps.
    assert rendered({"messages": PLAIN}, "{{ messages | length }}") == "2"


def test_images_alone_are_not_empty() -> None:
    part = {"type": "image_url", "image_url": {"url": "a.png"}}
    (chat,) = texts_and_chats({"messages": [turn("user", part)]}, "line 1")
    assert isinstance(chat, Chat)
    assert chat.messages[0]["content"] == [{"type": "image", "image": "a.png"}]
