"""What other tools leave in a checkpoint's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 5368709120\n"
"""What Git LFS has in place of a file."""


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads(path.read_text()) if path.exists() else {}
    change(settings)
    path.write_text(json.dumps(settings))


def with_code(folder: Path) -> Path:
    """Names code of the folder wherever transformers looks for it, at any depth."""
    named = {name: f"own.Own{name}" for name in ("AutoConfig", "AutoModelForCausalLM",
             "AutoModelForImageTextToText", "AutoProcessor")}  # fmt: skip

    def config(settings: dict[str, Any]) -> None:
        settings.update(auto_map=named, architectures=["OwnForCausalLM"])
        settings["custom_pipelines"] = {"own": {"impl": "own.Pipe", "pt": ["AutoModel"]}}
        for part in ("text_config", "vision_config"):
            if part in settings:
                settings[part]["auto_map"] = named

    edit(folder / "config.json", config)
    edit(folder / "tokenizer_config.json", lambda s: s.update(
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", None], "AutoProcessor": "own.Own"},
        tokenizer_class="OwnTokenizer", processor_class="OwnProcessor"))  # fmt: skip
    edit(folder / "generation_config.json", lambda s: s.update(auto_map=named))
    edit(folder / "processor_config.json", lambda s: s.update(
        processor_class="OwnProcessor",
        image_processor={"auto_map": named, "image_processor_type": "Own", "patch_size": 4},
    ))  # fmt: skip
    (folder / "own.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    return folder
