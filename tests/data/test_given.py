"""Data from Python: what it is, and whose fault it is if it is nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erniequant.data.given import Given, given, kind_of_members, members, records_of
from erniequant.data.inputs import ModelInput, sequences_of
from erniequant.errors import ErnieQuantError

CHAT = [{"role": "user", "content": "hi"}]


def kind(value: Any) -> str:
    found = given(value, "calib", "leave it out")
    assert isinstance(found, Given)
    return kind_of_members(found)[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a", "b"], "texts"),
        (("a",), "texts"),
        ([None, "a", None], "texts"),
        ([["a", "b"], ("c",)], "texts"),
        ([CHAT], "chats"),
        ([{"text": "a"}], "records"),
        ([{"messages": CHAT}], "records"),
        ([Path("a.txt")], "files"),
        ([torch.tensor([1, 2])], "batches"),
        (torch.ones(2, 3, dtype=torch.int64), "batches"),
        (np.ones((2, 3), dtype=np.int64), "batches"),
        ([np.array([1, 2])], "batches"),
        ([[1, 2], [3]], "batches"),
        ([[torch.ones(2, 3)]], "batches"),
        ([[[1, 2], [3]]], "batches"),
        ({"input_ids": [[1, 2]]}, "batches"),
        ([{"input_ids": [1, 2]}], "batches"),
        (ModelInput(torch.tensor([1])), "batches"),
        ((text for text in ["a"]), "texts"),
    ],
)
def test_kinds(value: Any, expected: str) -> None:
    assert kind(value) == expected


def test_names_and_paths_are_sources() -> None:
    assert given("builtin", "calib", "") == "builtin"
    assert given(Path("~/a.txt"), "calib", "") == "~/a.txt"


def test_looking_at_the_first_loses_nothing() -> None:
    taken = []

    def texts() -> Any:
        for text in ("a", "b", "c"):
            taken.append(text)
            yield text

    source = given(texts(), "calib", "")
    assert isinstance(source, Given) and source.once and not taken
    found, data = kind_of_members(source)
    assert taken == ["a"]
    assert list(records_of(data, found)) == [
        ("a", "calib[0]"), ("b", "calib[1]"), ("c", "calib[2]"),
    ]  # fmt: skip


def test_other_collections() -> None:
    from datasets import Dataset
    from torch.utils.data import DataLoader

    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    assert kind(rows) == kind(rows.to_iterable_dataset()) == "records"
    assert kind(DataLoader(["a", "b", "c"], batch_size=2)) == "texts"  # type: ignore[arg-type]
    ids = torch.ones(4, 3, dtype=torch.int64)
    tensors = torch.utils.data.TensorDataset(ids)
    assert kind(DataLoader(tensors, batch_size=2)) == "batches"
    loader = given(DataLoader(["a", "b", "c"], batch_size=2), "calib", "")  # type: ignore[arg-type]
    assert isinstance(loader, Given) and not loader.once
    assert [text for text, _ in records_of(loader, "texts")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "calib is None; leave it out"),
        (3, "calib is an int; give texts, chats"),
        (2.5, "calib is a float"),
        (b"text", "calib is a bytes"),
        ({"a", "b"}, "calib is a set"),
        ({"text": "a"}, "calib is a dict; give a list of records"),
        (lambda: "a", "calib is a function"),
        ([], "calib is empty"),
        ([None], "calib is empty"),
        ([torch.ones(2), None], r"calib\[1\] is None"),
        ([3], r"calib\[0\] is an int; give texts"),
        (["a", 3], r"calib\[1\] is an int; give texts"),
        (["a", b"b"], r"calib\[1\] is a bytes"),
        (["a", {"text": "b"}], r"calib\[1\] is a dict \(records\), but the first is of texts"),
        ([CHAT, "a"], r"calib\[1\] is a str \(texts\), but the first is of chats"),
        ([{"text": "b"}, torch.ones(2)], r"calib\[1\] is a Tensor \(batches\)"),
        (CHAT, r"calib\[0\] is a single message; a chat is a list"),
        ([["a", 3]], r"calib\[0\] is a list of int and str"),
        ([[]], r"calib\[0\] is a list"),
    ],
)
def test_a_wrong_type_names_itself(value: Any, message: str) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        source = given(value, "calib", "leave it out")
        assert isinstance(source, Given)
        found, data = kind_of_members(source)
        list(members(data, found))


def test_splits_are_told_apart() -> None:
    from datasets import Dataset, DatasetDict

    splits = DatasetDict(train=Dataset.from_list([{"text": "a"}]))
    with pytest.raises(
        ErnieQuantError, match=r"several splits; give one, such as calib\['train'\]"
    ):
        given(splits, "calib", "")


def test_tables_and_open_files_are_explained(tmp_path: Path) -> None:
    import pandas
    import pyarrow

    rows = [{"text": "a"}]
    for table, advice in (
        (pandas.DataFrame(rows), r"calib.to_dict\('records'\)"),
        (pyarrow.Table.from_pylist(rows), r"calib.to_pylist\(\)"),
    ):
        with pytest.raises(ErnieQuantError, match=f"calib is a table; give its rows, {advice}"):
            given(table, "calib", "")
    assert kind(pandas.Series(["a", "b"])) == "texts"
    (tmp_path / "a.txt").write_text("words")
    with (tmp_path / "a.txt").open() as file, pytest.raises(ErnieQuantError, match="open file"):
        given(file, "calib", "")


def test_a_text_that_names_a_file_is_questioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ErnieQuantError, match=r"calib\[0\] is 'a.txt', the name of a file"):
        list(records_of(Given(["a.txt"], "calib"), "texts"))


IDS = [[3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    "member",
    [
        torch.tensor(IDS), torch.tensor(IDS, dtype=torch.int32), np.array(IDS), IDS,
        [torch.tensor(IDS)], [torch.tensor(row) for row in IDS], [np.array(row) for row in IDS],
        {"input_ids": torch.tensor(IDS)}, {"input_ids": IDS}, {"input_ids": np.array(IDS)},
        {"input_ids": [[*row, 0] for row in IDS], "attention_mask": [[1, 1, 1, 0]] * 2},
    ],
)  # fmt: skip
def test_sequences(member: Any) -> None:
    found = sequences_of(member, None, "calib[0]")
    assert [entry.ids.tolist() for entry in found] == IDS
    assert all(entry.ids.dtype == torch.int64 for entry in found)


def test_sequences_of_other_lengths() -> None:
    for member in ([[3], [4, 5]], {"input_ids": [[3], [4, 5]]}):
        assert [e.ids.tolist() for e in sequences_of(member, None, "x")] == [[3], [4, 5]]
    row = {"input_ids": [3, 4, 0], "attention_mask": [1, 1, 0]}
    assert [e.ids.tolist() for e in sequences_of(row, None, "x")] == [[3, 4]]
    made = ModelInput(torch.tensor([3]))
    assert sequences_of(made, None, "x") == [made]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (torch.ones(2, 3), "numbers of type torch.float32; expected token ids"),
        (torch.ones(2, 2, 2, dtype=torch.int64), r"shape \[2, 2, 2\]"),
        (torch.tensor(3), r"shape \[\]"),
        (np.array([1.5]), "numbers of type torch.float64"),
        ([torch.ones(2, 3).long(), torch.ones(2, 3).long()], "a list of 2 tensors"),
        ({"input_ids": "words"}, "input_ids is not a table"),
        ({"input_ids": [["a"]]}, "input_ids is not a table"),
    ],
)
def test_what_are_no_token_ids(member: Any, message: str) -> None:
    with pytest.raises(ErnieQuantError, match=f"^here.*{message}"):
        sequences_of(member, None, "here")


def test_no_caller_is_needed_to_end(tmp_path: Path) -> None:
    """A generator that fails, fails as itself: it is the caller's."""

    def broken() -> Any:
        yield "a"
        raise KeyError("mine")

    source = given(broken(), "calib", "")
    assert isinstance(source, Given)
    found, data = kind_of_members(source)
    take: Callable[[], Any] = lambda: list(records_of(data, found))  # noqa: E731
    with pytest.raises(KeyError, match="mine"):
        take()
