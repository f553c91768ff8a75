"""Damaged input: 300 random cases, others every day, and every kind of damage that once got
through. `truth.py` says when a success is right."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Bases, attempt, expected_windows, judge, run_case

from erniequant.calibration.texts import CalibrationConfig, calibration_windows

CASES = 300
# Days since 1970 in UTC, so that every day tries other cases; FUZZ_SEED repeats a day's.
SEED = int(os.environ.get("FUZZ_SEED", time.time() // 86_400))
INDEX, REPORT = "model.safetensors.index.json", "quantization_report.json"
Edit = Callable[[Path], Any]


def test_the_sample_of_the_day(bases: Bases) -> None:
    verdicts = [run_case(bases, SEED, case) for case in range(CASES)]
    failed = [verdict for verdict in verdicts if verdict.failed]
    assert not failed, f"{len(failed)} failures\n\n" + "\n\n".join(map(str, failed[:10]))
    # Neither refusing nor accepting everything would say much.
    right = sum(verdict.kind == "right" for verdict in verdicts)
    assert CASES / 10 < right < CASES * 9 / 10


def config(**changes: Any) -> Edit:
    """Set entries of config.json."""
    return edit_json("config.json", lambda c: c.update(changes))


def edit_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def apply(folder: Path) -> None:
        contents = json.loads((folder / name).read_text())
        edit(contents)
        (folder / name).write_text(json.dumps(contents))

    return apply


def edit_header(edit: Callable[[dict[str, Any]], Any], shard: str = "model.safetensors") -> Edit:
    def apply(folder: Path) -> None:
        raw = (folder / shard).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return apply


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def text(name: str, contents: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(contents)


def instead(name: str, make: Callable[[Path], Any]) -> Edit:
    """Something else where a file was."""
    return lambda folder: ((folder / name).unlink(), make(folder / name))


def flip_packed(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 4
    shard.write_bytes(raw)


def append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def forget_shard(folder: Path) -> None:
    """Take a shard with tensors that are not quantised out of the index; the file stays."""

    def edit(index: dict[str, Any]) -> None:
        lost = index["weight_map"]["model.embed_tokens.weight"]
        index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != lost}

    edit_json(INDEX, edit)(folder)


def other_code(settings: dict[str, Any]) -> None:
    for layer in settings["quantization_config"]["layers"].values():
        layer["down_proj"]["register_length"] = 12


def set_code(value: Any) -> Edit:
    return edit_json(
        "config.json",
        lambda c: c["quantization_config"]["layers"]["1"]["down_proj"].update(code=value),
    )


def point_index(value: Any) -> Edit:
    return edit_json(INDEX, lambda i: i["weight_map"].update({"model.norm.weight": value}))


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


def overlap(header: dict[str, Any]) -> None:
    one, other = (header[f"model.layers.{i}.input_layernorm.weight"] for i in (0, 1))
    one["data_offsets"] = other["data_offsets"]


DEEP = b"[" * 100_000 + b"]" * 100_000

REFUSED: dict[str, tuple[str, str, Edit]] = {
    # Tracebacks.
    "nested too deeply": ("load", "packed", text("config.json", b'{"a": ' + DEEP + b"}")),
    "nested 900 deep": ("inspect", "packed", text(REPORT, b'{"bits": ' + DEEP[:900] + DEEP[-900:] +
                                                  b"}")),
    "a shard that is a number": ("inspect", "sharded", point_index(True)),
    "a shard name beyond the system's": ("inspect", "plain", point_index("x" * 300)),
    "a shard name with a newline": ("inspect", "plain", point_index("a\nb.safetensors")),
    "a code that is a list": ("verify", "packed", set_code([])),
    "a text_config that is a number": ("inspect", "packed", config(text_config=3)),
    "an empty list of inner sizes": ("inspect", "packed", config(moe_intermediate_size=[])),
    "half of a surrogate pair": ("export", "packed", config(more="\ud800")),
    "an interval of zero": ("dry_run", "plain", config(moe_layer_interval=0)),
    "no least sum of routing weights": ("load", "plain", config(moe_norm_min=None)),
    "a model_type that is an object": ("export", "packed", config(model_type={"a": 1})),
    "frequencies of images that are an object": ("load", "vl", edit_json(
        "config.json", lambda c: c["text_config"]["rope_parameters"].update(
            mrope_section=[4, 4, {}]))),
    "a size of the original that is text": ("dry_run", "baidu_vl", config(hidden_size="96")),
    "no number of experts": ("dry_run", "plain", config(moe_k=None)),
    "return_dict": ("load", "packed", config(return_dict=False)),
    "a dtype that products do not take": ("load", "plain", config(dtype="float64")),
    "heads of an odd size": ("load", "packed", config(num_attention_heads=32,
                                                      num_key_value_heads=16)),
    "more experts per token than there are": ("load", "packed", config(moe_k=9)),
    "tokens that are numbers": ("load", "packed", edit_json(
        "tokenizer_config.json", lambda c: c.update(eos_token=3))),
    # Memory and time.
    "hidden size": ("load", "packed", config(hidden_size=2**40)),
    "layers": ("load", "plain", config(num_hidden_layers=10**9)),
    "layers of a plan": ("dry_run", "plain", config(num_hidden_layers=10**9)),
    "vocabulary": ("load", "plain", config(vocab_size=10**12)),
    "experts of a plan": ("dry_run", "plain", config(moe_num_experts=10**12)),
    "shared experts": ("load", "packed", config(moe_num_shared_experts=10**9)),
    "labels": ("dry_run", "plain", config(num_labels=10**12)),
    "another architecture, as large as its defaults": ("load", "plain",
                                                       config(model_type="deepseek_v3")),
    "a pipe for a config": ("load", "packed", instead("config.json", os.mkfifo)),
    "an endless config": ("inspect", "packed", instead(
        "config.json", lambda path: path.symlink_to("/dev/zero"))),
    "shape": ("load", "packed", edit_header(lambda h: first(h).update(shape=[2**62, 4]))),
    "shape of an empty tensor": ("inspect", "packed", edit_header(lambda h: h.update(
        {"model.mtp_x": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}))),
    "header length": ("inspect", "packed", text("model.safetensors", b"\xff" * 64)),
    # Wrong successes.
    "overlapping tensors": ("inspect", "packed", edit_header(overlap)),
    "bytes after the last tensor": ("inspect", "packed", append),
    "negative dimensions": ("inspect", "packed", edit_header(
        lambda h: first(h).update(shape=[-n for n in first(h)["shape"]]))),
    "fewer layers than tensors": ("load", "plain", config(num_hidden_layers=2)),
    "shared experts left over": ("load", "plain", config(moe_num_shared_experts=0)),
    "a tensor of integers": ("load", "packed", edit_header(
        lambda h: h["model.norm.weight"].update(dtype="I16"))),
    "a plan without the embedding": ("dry_run", "plain", forget_shard),
    "a shard that the index forgot": ("export", "sharded", forget_shard),
    "exported bits that flipped": ("export", "packed", flip_packed),
    "exported bits of a shard": ("export", "sharded", flip_packed),
    "exported with another code": ("export", "packed", edit_json("config.json", other_code)),
    "another quantisation method": ("inspect", "packed", edit_json(
        "config.json", lambda c: c["quantization_config"].update(quant_method="x"))),
    "keys twice": ("inspect", "packed", lambda folder: (folder / "config.json").write_text(
        '{"model_type": "x",' + (folder / "config.json").read_text()[1:])),
    "not a number": ("load", "packed", config(rms_norm_eps=float("nan"))),
    # Ways out of the folder.
    "a shard elsewhere": ("inspect", "plain", point_index("../outside/model.safetensors")),
    "a shard by its whole path": ("inspect", "plain", point_index("/etc/model.safetensors")),
    "a shard that is no safetensors": ("load", "plain", both(
        point_index("pytorch_model.bin"), text("pytorch_model.bin", b"x"))),
    "two kinds of weights": ("load", "plain", lambda folder: shutil.copy(
        folder / "model-00002-of-00008.safetensors", folder / "model.safetensors")),
    "checksums of other files": ("verify", "packed", edit_json(
        REPORT, lambda r: r["sha256"].update({"../outside/x": "0"}))),
    "other weights": ("load", "packed", config(transformers_weights="model.safetensors")),
    "a kernel of the hub": ("load", "packed", config(attn_implementation="evil/kernel")),
    "an adapter": ("load", "packed", text("adapter_config.json", b"{}")),
    "a vocabulary elsewhere": ("load", "packed", edit_json(
        "tokenizer_config.json", lambda c: c.update(tokenizer_file="../outside/tokenizer.json"))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_once_got_through_is_refused(bases: Bases, tmp_path: Path, name: str) -> None:
    target, base, edit = REFUSED[name]
    folder = tmp_path / "in"
    shutil.copytree(bases.folders[base], folder)
    edit(folder)
    started = time.perf_counter()
    verdict = judge(bases, 0, 0, target, base, folder, tmp_path, (name,))
    assert verdict.kind == "refused", verdict
    assert time.perf_counter() - started < 3


def link_shards_out(folder: Path) -> None:
    """As the cache of the Hugging Face hub keeps them."""
    (folder.parent / "outside").mkdir()
    for path in folder.glob("*.safetensors"):
        shutil.move(path, folder.parent / "outside")
        path.symlink_to(folder.parent / "outside" / path.name)


ACCEPTED: dict[str, tuple[str, str, Edit]] = {
    "links to files": ("load", "sharded", link_shards_out),
    # A digit for Python, but no number.
    "a layer ²": ("inspect", "packed", edit_header(lambda h: h.update(
        {"model.layers.²": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))),
    # transformers turns it into something else in place.
    "an old name of rope_parameters": ("export", "packed", config(
        rope_scaling={"type": "linear", "factor": 2.0})),
    "remote code that nobody asked for": ("load", "packed", config(
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_harmless_is_taken(bases: Bases, tmp_path: Path, name: str) -> None:
    target, base, edit = ACCEPTED[name]
    folder = tmp_path / "in"
    shutil.copytree(bases.folders[base], folder)
    edit(folder)
    verdict = judge(bases, 0, 0, target, base, folder, tmp_path, (name,))
    assert verdict.kind == "right", verdict


@pytest.mark.parametrize(
    "edit", [flip_packed, edit_json("config.json", other_code), forget_shard,
             edit_json(REPORT, lambda r: r["sha256"].clear())]
)  # fmt: skip
def test_verify_is_not_taken_in(bases: Bases, tmp_path: Path, edit: Edit) -> None:
    from erniequant.formats.verbs import verify

    folder = tmp_path / "in"
    shutil.copytree(bases.folders["sharded"], folder)
    edit(folder)
    kind, found = attempt(lambda: verify(folder))
    assert kind == "refused" or (kind == "right" and not found.ok), found


@pytest.mark.parametrize(
    ("line", "good"),
    [
        # Separators that end a line for Python, but not in JSON.
        ('{"text": "one\u2028two\x85three"}', True),
        ('{"text": "\\ud800"}', False),
        ('{"text": "a", "text": 3}', False),
        ("[" * 100_000, False),
        ('{"text": ' + "9" * 5000 + "}", False),
    ],
)
def test_lines(bases: Bases, tmp_path: Path, line: str, good: bool) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(line, encoding="utf-8")
    settings = CalibrationConfig(str(path), samples=1000, length=8)
    kind, found = attempt(lambda: calibration_windows(bases.tokenizer, settings))
    assert kind == ("right" if good else "refused"), found
    if good:
        assert found.sha256 == expected_windows(bases, path)
