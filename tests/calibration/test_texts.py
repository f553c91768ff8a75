"""Calibration text from every source; the tokenizer is letters, so windows can be read."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from erniequant.calibration.texts import CalibrationConfig, calibration_windows
from erniequant.data.inputs import ModelInput
from erniequant.data.token_hash import hash_token_ids
from erniequant.errors import ErnieQuantError


class Letters:
    eos_token_id = 0
    chat_template = "template"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def text_of(windows: tuple[ModelInput, ...]) -> str:
    ids = torch.cat([window.ids for window in windows])
    return "".join("|" if i == 0 else chr(i) for i in ids.tolist())


def config(source: Path | str, **changes: object) -> CalibrationConfig:
    return CalibrationConfig(str(source), **{"samples": 100, "length": 4, **changes})


def test_a_text_is_cut_into_windows_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij")
    found = calibration_windows(Letters(), config(tmp_path / "a.txt"))
    # Eleven tokens with the end mark: two windows of four, the rest is dropped.
    assert [text_of((w,)) for w in found.windows] == ["abcd", "efgh"]
    assert found.tokens == 8
    assert found.sha256 == hash_token_ids(torch.tensor([ord(c) for c in "abcdefgh"]))


def test_windows_are_chosen_by_seed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(32 + i % 90) for i in range(400)))
    few = {"samples": 5}
    first = calibration_windows(Letters(), config(tmp_path / "a.txt", **few))
    again = calibration_windows(Letters(), config(tmp_path / "a.txt", **few))
    other = calibration_windows(Letters(), config(tmp_path / "a.txt", seed=1, **few))
    assert first.sha256 == again.sha256 != other.sha256
    assert len({text_of((w,)) for w in first.windows}) == 5


def test_a_short_text_is_one_short_window(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    assert text_of(calibration_windows(Letters(), config(tmp_path / "a.txt")).windows) == "ab|"


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}


@pytest.mark.parametrize(("mode", "rendered"), [("apply", "<user>hi<bot>yo|"), ("none", "hi\nyo|")])
def test_chat_messages(tmp_path: Path, mode: str, rendered: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "abc"}) + "\n\n" + json.dumps(CHAT) + "\n")
    found = calibration_windows(Letters(), config(path, chat_template=mode, length=100))
    assert text_of(found.windows) == "abc|" + rendered
    assert found.rendered == "abc"


def test_a_data_set_is_read_by_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, split, streaming))
        return [{"body": "ab", "text": "no"}, {"body": "cd", "text": "no"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = calibration_windows(Letters(), config("hf:some/name:test:body", length=2))
    assert text_of(found.windows) == "ab|cd|"
    assert asked == [("some/name", "test", True)]


def test_a_column_may_hold_chats_but_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"talk": CHAT["messages"], "text": "no"}, {"talk": None, "text": "no"}]
    made = SimpleNamespace(load_dataset=lambda name, split, streaming: rows)
    monkeypatch.setitem(sys.modules, "datasets", made)
    found = calibration_windows(Letters(), config("hf:some/name::talk", length=14))
    assert (text_of(found.windows), found.empty) == ("<user>hi<bot>y", 1)
    with pytest.raises(ErnieQuantError, match="no column 'body' but talk, text: name one as hf:"):
        calibration_windows(Letters(), config("hf:some/name::body"))


def test_a_local_folder_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "abc"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_of(calibration_windows(Letters(), config("hf:~/set")).windows) == "abc|"


def test_the_built_in_text_has_a_third_chinese() -> None:
    found = calibration_windows(Letters(), config("builtin", samples=400, length=512))
    ids = torch.cat([window.ids for window in found.windows])
    assert found.tokens == 400 * 512
    assert float(((ids >= 0x4E00) & (ids < 0xA000)).float().mean()) > 0.1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 3}', 'line 1 has neither "text" nor "messages"'),
        ("a.jsonl", '{"text": "a"}\n{oops', "line 2 is not JSON"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "line 1 has neither"),
        ("a.jsonl", "", "holds no text"),
        ("a.md", "text", "not one of builtin"),
        ("a.txt", None, "cannot read"),
        ("a.txt", b"ab\xff", "not UTF-8 \\(byte 2\\)"),
    ],
)
def test_bad_sources_are_named(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ErnieQuantError, match=message):
        calibration_windows(Letters(), config(path, length=2))


def test_messages_need_a_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT))
    tokenizer = Letters()
    tokenizer.chat_template = ""
    with pytest.raises(ErnieQuantError, match="no chat template; use --chat-template none"):
        calibration_windows(tokenizer, config(path))


def test_bad_settings_are_refused() -> None:
    for bad in ({"samples": 0}, {"length": 1}, {"chat_template": "maybe"}):
        with pytest.raises(ErnieQuantError):
            CalibrationConfig(**bad)
