"""Text files as editors, packers and version control leave them."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from erniequant.data import files
from erniequant.data.files import kind_of, read_text, text_blocks, text_lines
from erniequant.errors import ErnieQuantError

TEXT = "eins\n\n文\u2028字 \n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode("utf-8-sig"),
    ],
)
@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)],
)
def test_marks_line_ends_and_packing_do_not_matter(
    tmp_path: Path, content: bytes, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.TXT{suffix}"
    path.write_bytes(pack(content))
    assert kind_of(path) == "text"
    assert read_text(path) == TEXT
    # Only a line feed ends a line; the separator is part of one.
    assert list(text_lines(path)) == [(1, "eins"), (2, ""), (3, "文\u2028字 ")]


def test_blocks_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three bytes a character and two a line end: blocks of five cut through both.
    monkeypatch.setattr(files, "BLOCK", 5)
    text = "文字文字\n\n字" * 7
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    blocks = list(text_blocks(path))
    assert len(blocks) > 20 and "".join(blocks) == text
    assert [line for _, line in text_lines(path)] == text.split("\n")


def test_the_byte_that_is_not_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK", 4)
    path = tmp_path / "a.txt"
    # The first byte of a character at the end of a block, and no second in the next.
    path.write_bytes(b"abc\xe6xyz")
    with pytest.raises(ErnieQuantError, match=r"not UTF-8 \(byte 3\)"):
        read_text(path)
    path.write_bytes(b"abcdefgh\xe6\x96")
    with pytest.raises(ErnieQuantError, match=r"not UTF-8 \(byte 8\)"):
        read_text(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "cannot read .*a.txt: No such file"),
        ("a.txt", "ab".encode("utf-16"), "not UTF-8 but UTF-16: convert it"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.txt", b" \n\t", "holds no text"),
        ("a.txt.gz", b"plain", "a.txt.gz is damaged or cut short"),
        ("a.txt.gz", gzip.compress(b"words " * 9999)[:-20], "a.txt.gz is damaged or cut short"),
        ("a.txt.bz2", bz2.compress(b"words " * 9999)[:-20], "a.txt.bz2 is damaged or cut short"),
        ("a.txt.bz2", b"plain", "a.txt.bz2 is damaged or cut short"),
        ("a.txt.xz", lzma.compress(b"words " * 9999)[:-20], "a.txt.xz is damaged or cut short"),
        ("a.txt.xz", b"plain", "a.txt.xz is damaged or cut short"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ErnieQuantError, match=message):
        read_text(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ErnieQuantError, match="not a file"):
        read_text(tmp_path)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 1000)
    monkeypatch.setattr(files, "BLOCK", 100)
    path = tmp_path / "a.jsonl"
    path.write_text("short\n" + "x" * 5000)
    with pytest.raises(ErnieQuantError, match="line 2 has more than 1000 characters"):
        list(text_lines(path))


@pytest.mark.parametrize("name", ["a", "a.md", "a.gz", "a.parquet.gz", "a.zip", "txt"])
def test_other_names_are_of_no_kind(name: str) -> None:
    assert kind_of(Path(name)) is None
