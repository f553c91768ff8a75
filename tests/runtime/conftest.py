"""Tiny tensors: one thread is faster than two, and twenty times faster on a busy machine. Folders
of packed models of every family, and of what they export."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runtime.families import FAMILIES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of a family; a test that takes it runs for all."""
    name: str = request.param
    return name


@pytest.fixture
def packed(family: str, request: pytest.FixtureRequest) -> Path:
    """Folder of the packed micro model of `family`."""
    folder: Path = request.getfixturevalue(FAMILIES[family])
    return folder


@pytest.fixture(scope="session")
def _exports() -> dict[str, Path]:
    return {}


@pytest.fixture
def exported(
    family: str, packed: Path, _exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the export of `packed` in float32, which stock transformers loads."""
    if family not in _exports:
        import erniequant

        _exports[family] = tmp_path_factory.mktemp("exported") / family
        erniequant.export(packed, _exports[family], "fp32")
    return _exports[family]
