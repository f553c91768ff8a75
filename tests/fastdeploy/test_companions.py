"""Files beside the weights of a checkpoint for FastDeploy: as for all results, no code, a list."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.inspect import inspect_fastdeploy
from erniequant.formats.fastdeploy.reshard import reshard
from erniequant.formats.fastdeploy.verify import verify_fastdeploy
from tests.fastdeploy.conftest import write
from tests.foreign import POINTER, with_code


def test_no_code_and_only_what_is_listed(fd_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(fd_source, source)
    for number, ranks in enumerate((1, 2)):
        made = write(with_code(source), tmp_path / f"fd{number}", tensor_parallel=ranks)
        AutoTokenizer.from_pretrained(made, trust_remote_code=True)
        AutoConfig.from_pretrained(made, trust_remote_code=True)
        (made / "notes.txt").write_text("")
        report = erniequant.export(made, tmp_path / f"plain{number}")
        # Rank folders, shards and the index hold the weights; they are not left behind.
        assert report.left_behind == ("notes.txt",)
        AutoModelForCausalLM.from_pretrained(tmp_path / f"plain{number}", trust_remote_code=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_and_pointers(ranks: int, fd_single: Path, fd_ranks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fd"
    shutil.copytree(fd_single if ranks == 1 else fd_ranks, folder)
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ErnieQuantError, match="is a Git LFS pointer"):
        erniequant.export(folder, tmp_path / "plain")
    (folder / "adapter_config.json").write_text("{}")
    for road in (
        lambda: erniequant.load(folder, device="cpu"),
        lambda: erniequant.export(folder, tmp_path / "plain"),
        lambda: reshard(folder, tmp_path / "cut", tensor_parallel=2),
    ):
        with pytest.raises(ErnieQuantError, match="has an adapter beside its weights"):
            road()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fd"]
    problems = verify_fastdeploy(folder).problems
    assert [("has an adapter" in line, "LFS" in line) for line in problems] == [
        (True, False), (False, True),
    ]  # fmt: skip
    assert inspect_fastdeploy(folder).notes == (problems[0],)
    with pytest.raises(ErnieQuantError, match="is inside the source"):
        (folder / "adapter_config.json").unlink()
        erniequant.export(folder, folder / "plain")
