"""Large texts are read in excerpts all over them, and no more than is needed."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from erniequant.calibration import excerpts
from erniequant.calibration.excerpts import text_excerpts
from erniequant.errors import ErnieQuantError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lines of seven bytes and three bytes a character: excerpts begin within both.
    monkeypatch.setattr(excerpts, "WHOLE", 4000)
    monkeypatch.setattr(excerpts, "EXCERPT", 500)
    monkeypatch.setattr(excerpts, "_LEAST_TOKENS", 50)


def write(path: Path, lines: int, end: str = "\n") -> Path:
    data = "".join(f"文{number:05}{end}" for number in range(lines)).encode("utf-8-sig")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, wanted: int, seed: int = 0) -> list[str]:
    return ["".join(document) for document in text_excerpts(path, wanted, seed, len)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_excerpts_are_whole_lines_from_everywhere(tmp_path: Path, name: str, end: str) -> None:
    path = write(tmp_path / name, 20_000, end)
    found = read(path, 5000)
    numbers = [int(line[1:]) for text in found for line in text.splitlines()]
    assert all(line.startswith("文") and len(line) == 6 for t in found for line in t.splitlines())
    assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)
    assert sum(map(len, found)) > 4000
    assert min(numbers) < 4000 and max(numbers) > 16_000
    assert found == read(path, 5000) != read(path, 5000, seed=1)


def test_packed_or_not_the_same(tmp_path: Path) -> None:
    plain, packed = write(tmp_path / "a.txt", 20_000), write(tmp_path / "a.txt.gz", 20_000)
    assert read(plain, 5000) == read(packed, 5000)


@pytest.mark.parametrize(("lines", "wanted"), [(300, 10), (2000, 50_000)])
def test_small_texts_and_those_of_too_few_tokens_are_whole(
    tmp_path: Path, lines: int, wanted: int
) -> None:
    path = write(tmp_path / "a.txt", lines)
    assert read(path, wanted) == ["".join(f"文{number:05}\n" for number in range(lines))]


def test_bytes_read_do_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    from erniequant.data import files

    taken = 0

    class Counted:
        def __init__(self, file: Any):
            self.seek = file.seek
            self._file = file

        def read(self, size: int) -> bytes:
            nonlocal taken
            data: bytes = self._file.read(size)
            taken += len(data)
            return data

    @contextmanager
    def counted(path: Path) -> Any:
        with files.opened(path) as file:
            yield Counted(file)

    monkeypatch.setattr(excerpts, "opened", counted)
    amounts = []
    for lines in (5000, 50_000):
        taken = 0
        read(write(tmp_path / "a.txt", lines), 5000)
        amounts.append(taken)
    assert amounts[0] == amounts[1] <= 8000


def test_a_text_without_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    # 7001 bytes: excerpts begin and end within characters.
    path.write_text("x" + "文" * 7000)
    found = read(path, 1000)
    assert len(found) == 8 and all(set(text.removeprefix("x")) == {"文"} for text in found)
    assert all(len(text) >= 160 for text in found)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"words\n" * 50 + b"\xff\n" + b"words\n" * 2000)
    with pytest.raises(ErnieQuantError, match=r"not UTF-8 \(byte 300\)"):
        read(path, 100)
    path.write_bytes(("words\n" * 2000).encode("utf-16"))
    with pytest.raises(ErnieQuantError, match="UTF-16"):
        read(path, 100)
    packed = write(tmp_path / "a.txt.gz", 20_000)
    packed.write_bytes(packed.read_bytes()[:-50])
    with pytest.raises(ErnieQuantError, match="damaged or cut short"):
        read(packed, 100)
