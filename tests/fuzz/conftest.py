"""The checkpoints that are damaged: plain in shards, quantised in one file and in shards, and dense
and vision-language ones in one file each."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Bases  # noqa: E402

import erniequant  # noqa: E402
from erniequant.checkpoint import CheckpointWriter, open_checkpoint  # noqa: E402
from erniequant.checkpoint.files import write_json  # noqa: E402
from erniequant.data.companions import write_companions  # noqa: E402
from erniequant.data.tokenizers import load_tokenizer  # noqa: E402
from tests.micro_vl import as_baidu_releases_it  # noqa: E402

LINES = [
    {"text": "a quick test of lines"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"text": 'another, with "quotes"', "more": [1, 2]},
    {"text": "the last of them"},
]


def resharded(source: Path, target: Path, max_bytes: int) -> Path:
    """The same checkpoint in more shards; a report is brought up to date."""
    checkpoint = open_checkpoint(source)
    with CheckpointWriter(target, max_bytes) as writer:
        for name in checkpoint.names():
            writer.add(name, checkpoint.tensor(name))
        written = writer.finish()
    write_companions(source, target)
    shutil.copy(source / "config.json", target)
    report = source / "quantization_report.json"
    if report.is_file():
        write_json(
            target / report.name, {**json.loads(report.read_text()), "sha256": written.sha256}
        )
    return target


@pytest.fixture(scope="session")
def bases(
    micro_source: Path,
    micro_dense: Path,
    micro_vl: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bases:
    """All of them, made once."""
    root = tmp_path_factory.mktemp("fuzz")
    sources = {"packed": micro_source, "packed_dense": micro_dense, "packed_vl": micro_vl}
    for name, source in sources.items():
        erniequant.quantize(
            source, root / name, bits=2, no_calib=True, max_tp=1, effort="fast", threads=1
        )
    lines = root / "lines.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return Bases(
        {
            "plain": resharded(micro_source, root / "plain", 150_000),
            "packed": root / "packed",
            "sharded": resharded(root / "packed", root / "sharded", 60_000),
            "dense": micro_dense,
            "packed_dense": root / "packed_dense",
            "vl": micro_vl,
            "baidu_vl": as_baidu_releases_it(micro_vl, root / "baidu_vl"),
            "packed_vl": root / "packed_vl",
        },
        lines,
        load_tokenizer(micro_source),
    )
