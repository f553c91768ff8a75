"""Seeded damage of a checkpoint folder: which file, and what happens to it."""

import os
import random
import shutil
from pathlib import Path

from json_damage import damage_json
from shard_damage import damage_lines, damage_shard

# How often a file is met: most checks are about the first few.
WEIGHTS = {
    "config.json": 8,
    "model.safetensors.index.json": 4,
    "quantization_report.json": 3,
    "generation_config.json": 1,
    "tokenizer.json": 2,
    "tokenizer_config.json": 3,
}
EVIL_MODULE = """
from pathlib import Path
(Path(__file__).resolve().parent / "EXECUTED").touch()
class Evil: pass
"""


class Pickled:
    """Unpickling this makes the file that `executed` looks for."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):  # noqa: ANN204
        return os.system, (f"touch {self.target}",)


def mutate(folder: Path, rng: random.Random) -> str:
    """One change to one file of a checkpoint folder; returns what was done."""
    shards = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    files = [folder / n for n in WEIGHTS if (folder / n).is_file()]
    kind = rng.choices(("json", "shard", "file"), (5, 5, 1))[0]
    if kind == "json" and files:
        path = rng.choices(files, [WEIGHTS[p.name] for p in files])[0]
        return damage_json(_own(path), rng)
    if kind == "shard" and shards:
        return damage_shard(_own(rng.choice(shards)), rng)
    return _damage_file(folder, files + shards, rng)


def mutate_lines(path: Path, rng: random.Random) -> str:
    """One change to a JSONL file, or to what stands in its place."""
    if rng.random() < 0.05:
        return _replace(path, path.parent, rng)
    return damage_lines(path, rng)


def _own(path: Path) -> Path:
    """Never write through a link that an earlier mutation made."""
    if path.is_symlink():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    return path


def _damage_file(folder: Path, files: list[Path], rng: random.Random) -> str:
    if rng.random() < 0.3 or not files:
        return _plant(folder, rng)
    return _replace(rng.choice(files), folder, rng)


def _replace(path: Path, folder: Path, rng: random.Random) -> str:
    how = rng.choice(
        ("remove", "folder", "link out", "loop", "dangling", "zero", "pipe", "shorter")
    )
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    if how == "link out":
        shutil.copy(path, outside / path.name)
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link out":
        path.symlink_to(outside / path.name)
    elif how == "loop":
        path.symlink_to(path)
    elif how == "dangling":
        path.symlink_to(outside / "nothing")
    elif how == "zero":
        path.symlink_to("/dev/zero")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "shorter":
        path.write_bytes(data[: len(data) // 2])
    return f"{path.name}: {how}"


def _plant(folder: Path, rng: random.Random) -> str:
    import pickle

    how = rng.choice(("pickle", "module", "decoy", "adapter", "template", "variant"))
    if how == "pickle":
        name = rng.choice(["pytorch_model.bin", "model.safetensors", "optimizer.pt"])
        payload = pickle.dumps(Pickled(folder / "EXECUTED"))
        _fresh(folder / name).write_bytes(payload)
    elif how == "module":
        _fresh(folder / "evil.py").write_text(EVIL_MODULE)
        return (
            f"evil.py and {damage_json(_own(folder / 'config.json'), rng)}"
            if (folder / "config.json").is_file()
            else "evil.py"
        )
    elif how == "decoy":
        shards = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
        if shards:
            data = shards[-1].read_bytes()
            _fresh(folder / "model.safetensors").write_bytes(data)
    elif how == "adapter":
        _fresh(folder / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "../outside"}'
        )
    elif how == "template":
        _fresh(folder / "chat_template.jinja").write_text(rng.choice(["{{ x", "{{ 1/0 }}", "\x00"]))
    else:
        _fresh(folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    return f"plant {how}"


def _fresh(path: Path) -> Path:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    return path
