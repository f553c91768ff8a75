"""The example calibrates on its own batches: on every token of the chats and on no padding."""

import json
from pathlib import Path

import pytest

from tests.examples.conftest import RunExample

# The longest is cut; every batch of eight needs padding.
CHATS = [("hello " * (i % 7 + 1), f"yes, {i}") for i in range(19)]
LENGTH = 40


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    roles = ("user", "assistant")
    lines = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, chat, strict=True)]}
        for chat in CHATS
    ]
    # A file edited by hand ends in an empty line.
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def tokens(chat: tuple[str, str]) -> int:
    """Of ``u:...</s>a:...</s>``: one per character, and one for each end."""
    return min(sum(len("u:") + len(said) + 1 for said in chat), LENGTH)


def report(folder: Path) -> dict:
    return json.loads((folder / "quantization_report.json").read_text())


def test_tokens_count_and_padding_does_not(
    chat_source: Path, data: Path, tmp_path: Path, run_example: RunExample
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        out = run_example("custom_calibration", chat_source, folder, data, "--length", LENGTH)
    first, second = map(report, folders)
    total = sum(map(tokens, CHATS))
    assert any(tokens(chat) == LENGTH for chat in CHATS) and total < len(CHATS) * LENGTH
    assert f"{len(CHATS)} chats, {total} tokens; " in out
    assert first["calibration"]["tokens"] == total
    # Every token goes to two experts of each layer.
    assert {sum(counts) for counts in first["tokens_per_expert"].values()} == {2 * total}
    # The order of the batches is the same again, or no interrupted run could go on.
    assert first["sha256"] == second["sha256"]


def test_as_many_chats_as_asked_for(
    chat_source: Path, data: Path, tmp_path: Path, run_example: RunExample
) -> None:
    out = run_example("custom_calibration", chat_source, tmp_path / "q", data, "--samples", 5)
    assert out.startswith("5 chats, ")
    assert report(tmp_path / "q")["calibration"]["windows"] == 5


def test_a_failure_is_one_line(data: Path, tmp_path: Path, run_example: RunExample,
                               chat_source: Path) -> None:  # fmt: skip
    with pytest.raises(SystemExit, match="^error: .*bits"):
        run_example("custom_calibration", chat_source, tmp_path / "q", data, "--bits", 7)
