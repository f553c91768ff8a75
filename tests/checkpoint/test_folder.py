"""Which files of a folder go with its weights, stay behind, or are only seemingly there."""

from pathlib import Path

import pytest

from erniequant.checkpoint.config import plain_settings, quantized_by
from erniequant.checkpoint.folder import (
    companion_files,
    describe_left_behind,
    left_behind,
    require_apart,
    require_whole_companions,
)
from erniequant.checkpoint.reader import read_header
from erniequant.errors import ErnieQuantError
from tests.foreign import POINTER

COPIED = (
    "COPYING", "LICENSE", "License.txt", "NOTICE.md", "chat_template.jinja", "cl100k.tiktoken",
    "generation_config.json", "merges.txt", "preprocessor_config.json", "tokenizer.json",
    "tokenizer.model", "vocab.json",
)  # fmt: skip
# Names that only look like those on the list, a trainer's files, other formats, and hidden files.
LEFT = (
    ".gitattributes", "README.md", "Tokenizer.json", "adapter_config.json", "added_tokens.json.bak",
    "consolidated.safetensors", "model-00003-of-00002.safetensors", "modeling_own.py",
    "my_chat_template.jinja", "other.model", "pytorch_model.bin", "quantization_report.json",
    "tokenizer.py", "trainer_state.json",
)  # fmt: skip


def folder_with(folder: Path) -> Path:
    for name in (*COPIED, *LEFT, "config.json", "model.safetensors"):
        (folder / name).write_text(name)
    for name in ("LICENSES/a.txt", "additional_chat_templates/tool.jinja", "original/params.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text(name)
    return folder


def test_every_file_is_copied_or_left(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    found = [path.relative_to(folder).as_posix() for path in companion_files(folder)]
    assert found == [*sorted(COPIED), "additional_chat_templates/tool.jinja"]
    left = left_behind(folder, {"model.safetensors"})
    assert left == tuple(sorted((*LEFT, "LICENSES/", "original/")))


def test_the_line_names_eight_and_counts_the_rest() -> None:
    names = [f"f{i}" for i in range(8)]
    assert describe_left_behind([]) == ""
    assert describe_left_behind(["a"]) == "left behind (1): a"
    assert describe_left_behind(names) == f"left behind (8): {', '.join(names)}"
    assert describe_left_behind([*names, "g", "h"]) == (
        f"left behind (10): {', '.join(names)} and 2 more"
    )


@pytest.mark.parametrize("name", [b"odd\xff.bin", b"two\nlines.bin"])
def test_names_that_no_terminal_shows(name: bytes, tmp_path: Path) -> None:
    (Path(bytes(tmp_path).decode()) / name.decode("utf-8", "surrogateescape")).touch()
    (left,) = left_behind(tmp_path, ())
    assert left.isprintable() and left.encode("utf-8")


def test_a_link_to_nothing_and_a_pointer_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "other.bin").symlink_to("nowhere")
    require_whole_companions(tmp_path)
    (tmp_path / "merges.txt").symlink_to("nowhere")
    with pytest.raises(ErnieQuantError, match="merges.txt is a link to nowhere, which is not"):
        require_whole_companions(tmp_path)
    (tmp_path / "nowhere").write_bytes(POINTER)
    with pytest.raises(ErnieQuantError, match="merges.txt is a Git LFS pointer"):
        require_whole_companions(tmp_path)
    with pytest.raises(ErnieQuantError, match="nowhere is a Git LFS pointer"):
        read_header(tmp_path / "nowhere")
    # A word more than the first line of a pointer has.
    (tmp_path / "nowhere").write_bytes(b"#" + POINTER)
    require_whole_companions(tmp_path)


def test_apart_is_told_through_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    require_apart(tmp_path / "a", tmp_path / "ab")
    # The source inside the destination is refused elsewhere: that is not empty.
    require_apart(tmp_path / "a", tmp_path)
    with pytest.raises(ErnieQuantError, match="is the source itself"):
        require_apart(tmp_path / "a", tmp_path / "link")
    with pytest.raises(ErnieQuantError, match="is inside the source"):
        require_apart(tmp_path / "link", tmp_path / "a" / "b")


def test_settings_lose_code_and_nothing_else() -> None:
    settings = {
        "auto_map": {"AutoConfig": "a.B"}, "a": 1, "quantization_config": None,
        "text_config": {"quantization_config": {}, "auto_map": None, "rope": {"auto_map": 3}},
        "layers": [{"auto_map": 1, "b": None}], "custom_pipelines": {}, "compression_config": {},
    }  # fmt: skip
    assert plain_settings(settings) == {
        "a": 1, "text_config": {"rope": {}}, "layers": [{"b": None}],
    }  # fmt: skip
    real = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    assert plain_settings(real) == real
    assert quantized_by(settings) is None
    assert quantized_by(real) == "quantization_config with quant_method 'fp8' in text_config"
