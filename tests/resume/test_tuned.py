"""Killed while layers or the whole model are trained, or damaged afterwards: a run goes on to the
same bytes, or says in one line why not."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, load_file

from erniequant.checkpoint.reader import read_header
from testing.micro_model import add_tokenizer, write_micro_ernie
from tests.micro import FASTDEPLOY
from tests.resume.kills import Driver, contents, survive_kills

WORK = ".erniequant-work"
KILLS = 4
SHARDS = 60_000
"""Bytes of a shard: a dozen of them, of which some are complete after each layer and others, with
tensors of several layers, only at the end."""

FILE, LINE, HALF, SOME = 1, 2, 3, 11
"""Events after the file of trained tensors got its name: the folder's flush; the flush of the line
in the journal; the first write into a shard; writes among those that follow."""

Whole = Callable[..., dict[str, bytes]]


def stages(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "quantization_report.json").read_text())["tuned"]


@pytest.fixture(scope="module")
def fastdeploy_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest sizes that FastDeploy's layouts cover: one group of 128 in every direction."""
    sizes = dict(hidden_size=128, intermediate_size=128, moe_intermediate_size=128,
                 moe_num_experts=2, num_hidden_layers=3, moe_layer_end_index=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("source") / "fastdeploy"
    return add_tokenizer(write_micro_ernie(folder, **sizes))


@pytest.fixture(scope="module")
def run(
    driver: Driver,
    micro_source: Path,
    fastdeploy_source: Path,
    tuned_options: dict[str, Any],
) -> Callable[..., dict[str, Any]]:
    """A session in a format with a mode."""

    def session(dst: Path, format: str, tune: str, **request: Any) -> dict[str, Any]:
        native = format == "native"
        own = {} if native else {key: FASTDEPLOY[key] for key in ("format", "w4_layers")}
        options = tuned_options | own | {"tune": tune}
        return driver.run(micro_source if native else fastdeploy_source, dst, options, **request)

    return session


@pytest.fixture(scope="module")
def whole(
    run: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Whole]:
    """Files of a run that nothing interrupted, whose training changed every layer."""
    known: dict[Any, dict[str, bytes]] = {}

    def made(format: str, tune: str, shard_bytes: int) -> dict[str, bytes]:
        key = format, tune, shard_bytes
        if key not in known:
            folder = tmp_path_factory.mktemp("whole") / "q"
            assert run(folder, format, tune, shard_bytes=shard_bytes)["ok"]
            assert [stage["layer"] for stage in stages(folder)] == [1, 2, 3][
                : 2 + (tune != "layer")
            ]
            assert all(stage["epochs"] and stage["moved"] for stage in stages(folder))
            known[key] = contents(folder)
        return known[key]

    return made


@pytest.mark.parametrize(
    ("format", "tune", "shard_bytes", "places"),
    [
        ("native", "layer", SHARDS, (HALF, LINE)),
        ("native", "layer", 10**9, (LINE, SOME)),
        ("native", "model", SHARDS, (SOME, HALF, LINE)),
        ("native", "model", 10**9, (LINE, SOME, HALF)),
        ("fastdeploy", "layer", 10**9, (SOME, LINE)),
        ("fastdeploy", "model", SHARDS, (HALF, LINE, SOME)),
    ],
)
def test_killed_while_it_trains(
    run: Callable[..., dict[str, Any]],
    whole: Whole,
    tmp_path: Path,
    format: str,
    tune: str,
    shard_bytes: int,
    places: tuple[int, ...],
) -> None:
    dst, last = tmp_path / "q", f"tuned-{len(places):05d}.safetensors"
    expected = whole(format, tune, shard_bytes)

    def kill(on: str, later: int) -> list[dict[str, Any]]:
        outcome = run(dst, format, tune, shard_bytes=shard_bytes, kill_on=(on, later))
        assert outcome == {"signal": 9}, (on, later)
        journal = (dst / WORK / "journal.jsonl").read_text()
        return [line for line in journal.splitlines() if '"event":"tuned"' in line]

    for stage, place in enumerate(places[:-1], start=1):
        lines = kill(f"replace tuned-{stage:05d}.safetensors", place)
        assert len(lines) == stage
    # Its file half there, then its file without its line, then its line.
    for on, place in ((f"fsync .{last}", 0), (f"replace {last}", FILE)):
        assert len(kill(on, place)) == len(places) - 1
    assert len(kill(f"replace {last}", places[-1])) == len(places)
    if shard_bytes == SHARDS:
        # The first shard of several that are complete now has its name and its line.
        kill("replace model-", 4)
        assert any(dst.glob("model-*")) and any(dst.glob(".model-*.partial"))
    outcome = run(dst, format, tune, shard_bytes=shard_bytes)
    assert outcome.get("ok"), outcome
    assert contents(dst) == expected
    assert all(stage["epochs"] and stage["moved"] for stage in stages(dst))


def test_killed_anywhere_while_it_trains(
    driver: Driver, micro_source: Path, tuned_options: dict[str, Any], tmp_path: Path
) -> None:
    # With one to three threads, and with tables in memory or on disk.
    assert survive_kills(driver, micro_source, tuned_options, tmp_path, KILLS, seed=18) == []


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "on"),
    [
        # Both are read again by the session that goes on.
        ("tuned-00001.safetensors", "replace tuned-00001.safetensors"),
        ("gradient-00001.safetensors", "replace gradient-00001.safetensors"),
    ],
)
def test_damage_to_kept_tensors_is_one_line(
    run: Callable[..., dict[str, Any]], tmp_path: Path, file: str, on: str
) -> None:
    base, dst = tmp_path / "base", tmp_path / "q"
    assert run(base, "native", "layer", kill_on=(on, LINE)) == {"signal": 9}
    kept = dst / WORK / file
    for damage, error in (
        (lambda: _flip(kept, 1000), f"{kept} is damaged: its sha256 differs; use --restart"),
        (lambda: os.truncate(kept, 1000), f"{kept} is damaged: its sha256 differs; use --restart"),
        (
            kept.unlink,
            f"cannot read {kept}: No such file or directory; check space and permissions",
        ),
    ):
        shutil.copytree(base, dst)
        damage()
        assert run(dst, "native", "layer")["error"] == error
        shutil.rmtree(dst)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.experts.down_proj_scale",
        "model.layers.1.mlp.gate.weight",
    ],
)
def test_damage_to_a_trained_tensor_in_an_unfinished_shard_is_found(
    run: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    dst = tmp_path / "q"
    # In layer 2, after layer 1 was left behind.
    on = ("fsync .tuned-00002.safetensors", 0)
    assert run(dst, "native", "layer", kill_on=on) == {"signal": 9}
    partial = dst / ".model.safetensors.partial"
    _flip(partial, read_header(partial)[name].offset + 5)
    error = run(dst, "native", "layer")["error"]
    assert error == f"{name} in {dst} is not what this run wrote; use --restart"


@pytest.mark.parametrize("tune", ["layer", "model"])
def test_a_layer_that_the_journal_does_not_tell_of(
    run: Callable[..., dict[str, Any]], tmp_path: Path, tune: str
) -> None:
    dst = tmp_path / "q"
    on = ("fsync .tuned-00002.safetensors", 0)
    assert run(dst, "native", tune, kill_on=on) == {"signal": 9}
    journal = dst / WORK / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    told = [line for line in lines if '"event":"tuned"' in line]
    assert len(told) == 1
    journal.write_text("".join(line for line in lines if line not in told))
    error = run(dst, "native", tune)["error"]
    assert error == (
        f"the journal in {dst / WORK} does not say how layer 1 was trained; use --restart"
    )


def test_what_was_compared_is_trained(
    run: Callable[..., dict[str, Any]], whole: Whole, tmp_path: Path
) -> None:
    # Without epochs, windows are set aside for training, which then changes nothing.
    assert run(tmp_path / "q", "native", "layer", steps={"epochs": 0})["ok"]
    still = load_file(tmp_path / "q/model.safetensors")
    layer, model = (
        load(whole("native", tune, 10**9)["model.safetensors"]) for tune in ("layer", "model")
    )
    # Fitted to the same windows: the words of the first layer are those of a run without training.
    words = "model.layers.1.mlp.experts.down_proj_packed"
    assert still[words].equal(layer[words]) and still[words].equal(model[words])
    for index in (1, 2):
        for name in ("self_attn.o_proj.weight", "mlp.gate.weight", "mlp.experts.down_proj_scale"):
            full = f"model.layers.{index}.{name}"
            assert not still[full].equal(layer[full]), full
            # Attention is trained by its layer alone.
            assert layer[full].equal(model[full]) == ("self_attn" in name), full
