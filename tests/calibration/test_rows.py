"""Tables in memory and in mapped files are the same, and a mapped one leaves nothing behind."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from erniequant.calibration.rows import RowPool
from erniequant.errors import ErnieQuantError
from tests.conftest import FileLimit


@pytest.fixture(params=["memory", "mapped"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> RowPool:
    return RowPool(tmp_path if request.param == "mapped" else None)


# One number; rows that fill no page of 4096 bytes; more than a page in a row.
@pytest.mark.parametrize("shape", [(1, 1), (37, 29), (5, 1500)])
def test_what_is_written_is_read_back_after_its_memory_was_let_go(
    pool: RowPool, shape: tuple[int, int]
) -> None:
    # All bits count: nan, inf and minus zero are among them.
    wanted = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
    wanted[0, -1] = -(2**31)
    table = pool.empty(*shape)
    assert table.tensor.dtype == torch.float32 and table.tensor.shape == shape
    table.tensor.copy_(wanted.view(torch.float32))
    table.release()
    table.release()
    assert torch.equal(table.tensor.view(torch.int32), wanted)
    # Page by page, forgotten after each.
    for row in range(shape[0]):
        table.tensor[row] = float(row)
        table.release()
    assert torch.equal(table.tensor[:, 0], torch.arange(shape[0], dtype=torch.float32))


def test_rows_are_added_in_place(pool: RowPool) -> None:
    table = pool.empty(600, 7)
    table.tensor.zero_()
    expected = torch.zeros(600, 7)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 600, (900,), generator=generator)
        values = torch.randn(900, 7, generator=generator)
        table.tensor.index_add_(0, rows, values)
        table.release()
        expected.index_add_(0, rows, values)
    assert torch.equal(table.tensor, expected)


def test_tables_do_not_share_memory(pool: RowPool) -> None:
    first, second = pool.empty(3, 2), pool.empty(3, 2)
    first.tensor.fill_(1)
    second.tensor.fill_(2)
    first.release()
    assert first.tensor.eq(1).all() and second.tensor.eq(2).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_a_table_of_nothing_is_one(pool: RowPool, shape: tuple[int, int]) -> None:
    table = pool.empty(*shape)
    assert table.tensor.shape == shape and table.tensor.dtype == torch.float32
    table.tensor.index_add_(0, torch.zeros(0, dtype=torch.int64), torch.zeros(0, shape[1]))
    table.release()


def test_a_mapped_table_has_no_name_and_no_open_file(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    table = RowPool(tmp_path).empty(1000, 10)
    table.tensor.fill_(1)
    assert list(tmp_path.iterdir()) == []
    # The mapping itself keeps one descriptor, which goes with the table.
    assert len(os.listdir("/dev/fd")) <= before + 1
    kept = table.tensor
    del table
    assert kept.sum() == 10_000
    del kept
    assert len(os.listdir("/dev/fd")) == before


def test_a_mapped_table_is_no_memory_once_let_go(tmp_path: Path) -> None:
    def resident() -> int:
        return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[2])

    n_bytes = 64 << 20
    before = resident()
    table = RowPool(tmp_path).empty(n_bytes // 4096, 1024)
    table.tensor.fill_(1)
    assert resident() - before > 0.9 * n_bytes
    table.release()
    assert resident() - before < 0.1 * n_bytes
    # What is no memory of the process is in a file of the folder, not elsewhere in memory.
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert table.tensor[-1, -1] == 1


def test_a_disk_without_room_says_so_when_a_table_is_made(
    tmp_path: Path, files_of_at_most: FileLimit, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = re.escape(str(tmp_path))
    with files_of_at_most(3999):
        with pytest.raises(ErnieQuantError, match=rf"^cannot write {folder}: File too large; .*\Z"):
            RowPool(tmp_path).empty(10, 100)
        # In memory there is room.
        RowPool().empty(10, 100).tensor.fill_(1)
    with files_of_at_most(4000):
        RowPool(tmp_path).empty(10, 100).tensor.fill_(1)

    def full(descriptor: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, 4000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ErnieQuantError, match=rf"^cannot write {folder}: No space left .*\Z"):
        RowPool(tmp_path).empty(10, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_cannot_reserve_space_still_has_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    table = RowPool(tmp_path).empty(100, 100)
    table.tensor.fill_(3)
    table.release()
    assert table.tensor.eq(3).all()


def test_a_vanished_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ErnieQuantError, match=r"^cannot write .*/gone: No such file .*\Z"):
        RowPool(tmp_path / "gone").empty(2, 2)
