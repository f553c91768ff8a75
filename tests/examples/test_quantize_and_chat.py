"""The example quantises once, and the model is told all that was said before."""

import io
import re
from pathlib import Path

import pytest

import erniequant
from tests.examples.conftest import RunExample

MAX_TOKENS = 8


def chat(
    monkeypatch: pytest.MonkeyPatch, run_example: RunExample, said: str, *arguments: object
) -> list[str]:
    """The answers."""
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    out = run_example("quantize_and_chat", *arguments, "--max-tokens", MAX_TOKENS)
    # The model says ">" as well, but not at the start of a line.
    return [answer.strip() for answer in re.split("^> ", out, flags=re.MULTILINE)]


def test_the_model_answers_the_whole_chat(
    chat_source: Path, micro_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    run_example: RunExample,
) -> None:  # fmt: skip
    folder = tmp_path / "q"
    # What follows an empty line is not said.
    said = "hi\nwhy?\n\nno"
    head, first, second, last = chat(
        monkeypatch, run_example, said, chat_source, folder, "--calib", micro_text
    )
    assert "bits per weight" in head and not last
    model, tokenizer = erniequant.load(folder)

    def answer(conversation: str) -> str:
        return erniequant.generate(
            model, tokenizer, conversation, max_tokens=MAX_TOKENS, chat_template="none"
        ).text

    told = answer("u:hi</s>a:")
    assert first == told.strip()
    assert second == answer(f"u:hi</s>a:{told}</s>u:why?</s>a:").strip()
    # Otherwise the comparison would say nothing.
    for forgotten in ("u:why?</s>a:", "u:hi</s>u:why?</s>a:"):
        assert second != answer(forgotten).strip()

    # It is quantised already, so the original is not read. The end of the input ends the chat.
    again = chat(monkeypatch, run_example, "hi\nwhy?", tmp_path / "gone", folder)
    assert again == ["", first, second, ""]


def test_what_cannot_chat_is_one_line(
    micro_source: Path, tmp_path: Path, run_example: RunExample
) -> None:
    with pytest.raises(SystemExit, match="has no chat template"):
        run_example("quantize_and_chat", micro_source, micro_source)
    with pytest.raises(SystemExit, match="^error: .*gone"):
        run_example("quantize_and_chat", tmp_path / "gone", tmp_path / "q")
