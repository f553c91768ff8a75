"""The same records from every kind of file."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from erniequant.data import files, records
from erniequant.data.records import read_records
from erniequant.errors import ErnieQuantError
from tests.micro_vl import write_image

# A line end, a separator and quotes in a text, digits that are no number, and a text in Chinese.
ROWS = [{"text": 'one,\n"two"'}, {"text": "007"}, {"text": "文字 NA"}]


def as_csv(rows: list[dict[str, Any]], **dialect: Any) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_lines(ROWS)),
        ("a.ndjson", as_lines(ROWS).replace("\n", "\r\n\r\n")),
        ("a.unknown", as_lines(ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        # Many call lines of JSON .json.
        ("a.json", as_lines(ROWS)),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.json", json.dumps({"version": "1", "data": ROWS, "tags": []})),
        ("a.csv", as_csv(ROWS)),
        ("a.csv", as_csv(ROWS, delimiter=";")),
        ("a.tsv", as_csv(ROWS, delimiter="\t")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_files(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    if packed and name == "a.unknown":
        path = tmp_path / "a.unknown"
        content = as_lines(ROWS)
    data = content.encode("utf-8-sig")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    found = list(read_records(path))
    assert [record for record, _ in found] == ROWS
    assert all(where.startswith(str(path)) for _, where in found)
    assert len({where for _, where in found}) == 3


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    # Brackets are a pattern for some libraries.
    path = tmp_path / "a[1] b.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    found = list(read_records(path))
    assert [record for record, _ in found] == ROWS
    assert found[1][1] == f"{path} row 2"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ErnieQuantError, match="cannot read .*parquet"):
        list(read_records(path))
    with pytest.raises(ErnieQuantError, match="there is no such file"):
        list(read_records(tmp_path / "none.parquet"))


def test_images_of_a_data_set_in_parquet(tmp_path: Path) -> None:
    import datasets

    data = write_image(tmp_path / "a.png", 16, 8).read_bytes()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_list(
        [{"image": {"bytes": data, "path": None}, "text": "a"}], features=features
    )
    rows.to_parquet(str(tmp_path / "a.parquet"))
    ((record, _),) = read_records(tmp_path / "a.parquet")
    assert record == {"image": {"bytes": data, "path": None}, "text": "a"}


def test_joined_files_have_marks_between(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode("utf-8-sig") * 2)
    assert [record["text"] for record, _ in read_records(path)] == ["a", "a"]


@pytest.mark.parametrize("wrapped", ["[{}]", '{{"data": [{}]}}'])
def test_json_is_parsed_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: str
) -> None:
    # Blocks of seven bytes cut through numbers, escapes and characters; the third value is longer
    # than many blocks.
    monkeypatch.setattr(files, "BLOCK", 7)
    rows = [{"text": 'a\\"文', "n": 123456789}, {"text": "b" * 500, "n": [1.5e3, True, None]}] * 3
    path = tmp_path / "a.json"
    path.write_text(wrapped.format(" ,\n".join(json.dumps(row) for row in rows)))
    assert [record for record, _ in read_records(path)] == rows


def test_a_list_is_not_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 100)
    read = 0

    def blocks(path: Path) -> Any:
        nonlocal read
        for block in files.text_blocks(path):
            read += len(block)
            yield block

    monkeypatch.setattr(records, "text_blocks", blocks)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 40}] * 1000))
    found = read_records(path)
    for number in range(1, 11):
        next(found)
        assert read <= 60 * number + 300


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {oops]', "record 2 is not JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "neither , nor ] after record 1"),
        ("a.json", '[{"text": "a"}', "neither , nor ] after record 1"),
        ("a.json", '[{"text": "a"}] 3', "more text after the list"),
        ("a.json", '[{"text": "a"},', "record 2 is not JSON: the file ends before it"),
        ("a.json", '[{"text": "a", "text": "b"}]', "record 1 is not JSON: the key 'text' twice"),
        ("a.json", "[" * 100_000, "record 1 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.csv", "text\nan unquoted, text\n", "line 2 has 2 cells, but the first line names 1"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ErnieQuantError, match=message):
        list(read_records(path))


def test_a_value_that_never_ends_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST", 1000)
    monkeypatch.setattr(files, "BLOCK", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"text": "x"}] * 1000}))
    with pytest.raises(ErnieQuantError, match="longer than 1000 characters.*one record a line"):
        list(read_records(path))


def test_csv_cells_may_be_long_and_rows_short(tmp_path: Path) -> None:
    # The module's own limit is 131072 characters.
    rows = [{"id": "1", "text": "x" * 200_000}, {"id": "2", "text": "y"}]
    path = tmp_path / "a.csv"
    path.write_text(as_csv(rows) + "\n3\n")
    assert [r for r, _ in read_records(path)] == [*rows, {"id": "3"}]


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf")
        assert list(read_records(tmp_path / name)) == []
