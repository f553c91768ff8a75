"""Where evaluation text comes from, and what is said when it cannot be had."""

import datasets
import pytest

from erniequant.errors import ErnieQuantError
from erniequant.evaluate.texts import evaluation_text

ROWS = {"text": ["first", "", "  ", "second"], "other": ["a", "b", "c", "d"]}


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set; records what was asked for."""
    asked = []

    def load(name, split):
        asked.append((name, split))
        if name != "org/set":
            raise FileNotFoundError("no such\ndata set")
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(
    ("name", "split", "text"),
    [
        ("org/set", "test", "first\n\nsecond"),
        ("org/set:train", "train", "first\n\nsecond"),
        ("org/set:train:other", "train", "a\n\nb\n\nc\n\nd"),
        ("org/set::other", "test", "a\n\nb\n\nc\n\nd"),
    ],
)
def test_dataset_names_split_and_column(hub, name, split, text):
    assert evaluation_text(dataset=name) == text
    assert hub == [("org/set", split)]


def test_dataset_failures_are_one_line_with_a_way_out(hub):
    with pytest.raises(
        ErnieQuantError, match="cannot load data set org/none.*--text FILE"
    ) as caught:
        evaluation_text(dataset="org/none")
    assert "\n" not in str(caught.value)
    with pytest.raises(ErnieQuantError, match="no column 'body' but text, other"):
        evaluation_text(dataset="org/set:train:body")


def test_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "words.txt"
    file.write_bytes("eins\n\n文 \n".encode())
    assert evaluation_text(file=file) == "eins\n\n文 \n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot read"), (b"\xff\xfe1", "not UTF-8"), (b" \n", "holds no text")],
)
def test_files_that_are_refused(tmp_path, content, reason):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ErnieQuantError, match=reason):
        evaluation_text(file=file)


def test_null_rows_are_no_words(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["first", None, "second"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert evaluation_text(dataset="org/set") == "first\n\nsecond"
