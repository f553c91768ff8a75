"""A micro model that can chat, and running an example as its user does."""

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)

RunExample = Callable[..., str]


def add_template(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose tokenizer has a chat template."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunExample:
    """A function that runs ``examples/NAME.py`` with arguments; what it prints."""

    def run(name: str, *arguments: Any) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def chat_source(micro_source: Path, tmp_path: Path) -> Path:
    """`micro_source` with a chat template."""
    return add_template(micro_source, tmp_path / "chat_source")
