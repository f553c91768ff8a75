"""Sources as other tools leave them: the result and its export load without the source's code, and
what would make them useless is said before any work. Text, vision-language and dense models alike.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import inspect, verify
from testing.micro_model import add_tokenizer
from tests.foreign import POINTER, edit, with_code

OPTIONS: dict[str, Any] = {"bits": 2, "no_calib": True, "max_tp": 1, "effort": "fast", "threads": 1}
KINDS = ("text", "vl", "dense")
IDS = torch.arange(2, 19).view(1, 17)

Source = Callable[[str], Path]


@pytest.fixture
def source(micro_source: Path, micro_vl: Path, micro_dense: Path, tmp_path: Path) -> Source:
    """A function that copies the checkpoint of a kind, with a tokenizer."""
    folders = {"text": micro_source, "vl": micro_vl, "dense": micro_dense}

    def copy(kind: str) -> Path:
        folder = tmp_path / f"source-{kind}"
        shutil.copytree(folders[kind], folder)
        return add_tokenizer(folder) if kind == "dense" else folder

    return copy


def auto(kind: str) -> Any:
    return AutoModelForImageTextToText if kind == "vl" else AutoModelForCausalLM


def logits(model: Any) -> torch.Tensor:
    vision = model.config.model_type == "ernie4_5_vl_moe"
    more = {"moe_mm_token_type_ids": torch.zeros_like(IDS)} if vision else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits.float()


def require_usable(kind: str, folder: Path, trust: bool = True) -> None:
    """Every class of transformers loads the folder, and the model computes what `load` does."""
    expected, tokenizer = erniequant.load(folder, device="cpu")
    model = auto(kind).from_pretrained(folder, trust_remote_code=trust)
    assert torch.equal(logits(model), logits(expected))
    stock = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    assert stock("some text")["input_ids"] == tokenizer("some text")["input_ids"] != []
    assert AutoConfig.from_pretrained(folder, trust_remote_code=trust).model_type
    GenerationConfig.from_pretrained(folder)
    assert erniequant.load(folder, device="cpu")[0] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_without_code(kind: str, source: Source, tmp_path: Path) -> None:
    folder = with_code(source(kind))
    report = erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    assert "own.py" in report.left_behind
    erniequant.export(tmp_path / "q", tmp_path / "plain")
    for made in (tmp_path / "q", tmp_path / "plain"):
        assert not list(made.glob("*.py"))
        for path in made.glob("*.json"):
            named = re.search(r"auto_map|custom_pipelines|\bown\.|Own", path.read_text())
            # The report is what names own.py as left behind.
            assert named is None or path.name == "quantization_report.json"
        for trust in (True, False):
            require_usable(kind, made, trust)
        (name,) = json.loads((made / "config.json").read_text())["architectures"]
        assert name == type(erniequant.load(made, device="cpu")[0]).__name__


def test_an_old_result_with_code_is_exported_without(packed_ernie: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(packed_ernie, folder)
    edit(folder / "config.json", lambda s: s.update(auto_map={"AutoConfig": "own.Own"}))
    erniequant.export(folder, tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_means_absent(kind: str, nothing: Any, source: Source, tmp_path: Path) -> None:
    # null and {} in every place; transformers itself stops at some of them.
    folder = source(kind)
    entries = dict.fromkeys(("quantization_config", "compression_config", "auto_map"), nothing)

    def config(settings: dict[str, Any]) -> None:
        settings.update(entries)
        for part in ("text_config", "vision_config"):
            if part in settings:
                settings[part].update(entries)

    edit(folder / "config.json", config)
    edit(folder / "tokenizer_config.json", lambda s: s.update(auto_map=nothing))
    model, tokenizer = erniequant.load(folder, device="cpu")
    assert torch.isfinite(logits(model)).all() and len(tokenizer("abc")["input_ids"]) == 3
    assert inspect(folder).format_version is None
    for road in (verify, lambda f: erniequant.export(f, tmp_path / "no")):
        with pytest.raises(ErnieQuantError, match="is not quantised"):
            road(folder)
    erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    assert verify(tmp_path / "q", folder).ok
    erniequant.export(tmp_path / "q", tmp_path / "plain")
    for made in (tmp_path / "q", tmp_path / "plain"):
        require_usable(kind, made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ("compression_config", {"format": "pack"}, "compression_config"),
        ("quantization_config", {"quantization": "wint8"}, "quantization 'wint8'"),
    ],
)
def test_a_real_quantisation_is_refused_by_its_name(
    kind: str, entry: str, value: Any, words: str, source: Source, tmp_path: Path
) -> None:
    folder = source(kind)
    edit(folder / "config.json", lambda s: s.get("text_config", s).update({entry: value}))
    with pytest.raises(ErnieQuantError, match=f"already quantised.*{words}.*give the bf16"):
        erniequant.quantize(folder, tmp_path / "q", dry_run=True, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_twice_says_how_to_get_a_plain_one(
    kind: str, source: Source, tmp_path: Path
) -> None:
    erniequant.quantize(source(kind), tmp_path / "q", **OPTIONS)
    with pytest.raises(ErnieQuantError, match="'erniequant'.*erniequant export SRC NEW"):
        erniequant.quantize(tmp_path / "q", tmp_path / "again", **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_refused_on_every_road(kind: str, source: Source, tmp_path: Path) -> None:
    folder = source(kind)
    erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    for place in (folder, tmp_path / "q"):
        (place / "adapter_config.json").write_text('{"base_model_name_or_path": "baidu/some"}')
    refused = r"has an adapter beside its weights \(adapter_config.json\).*merge_and_unload"
    for road in (
        lambda: erniequant.quantize(folder, tmp_path / "again", **OPTIONS),
        lambda: erniequant.quantize(folder, tmp_path / "again", dry_run=True, **OPTIONS),
        lambda: erniequant.load(folder, device="cpu"),
        lambda: erniequant.load(tmp_path / "q", device="cpu"),
        lambda: erniequant.export(tmp_path / "q", tmp_path / "plain"),
    ):
        with pytest.raises(ErnieQuantError, match=refused):
            road()
    assert not (tmp_path / "again").exists() and not (tmp_path / "plain").exists()
    (problem,) = verify(tmp_path / "q").problems
    (note,) = inspect(tmp_path / "q").notes
    assert problem == note and "adapter_config.json" in note


@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_an_adapter_alone_names_its_base(
    config: bool, source: Source, tmp_path: Path
) -> None:
    folder = source("text")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    edit(folder / "adapter_config.json", lambda s: s.update(base_model_name_or_path="baidu/base"))
    if not config:
        (folder / "config.json").unlink()
    for road in (
        lambda: erniequant.quantize(folder, tmp_path / "q", **OPTIONS),
        lambda: erniequant.load(folder, device="cpu"),
        lambda: inspect(folder),
        lambda: verify(folder),
    ):
        with pytest.raises(ErnieQuantError, match="only an adapter .* the model baidu/base"):
            road()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_on_the_list_stays_behind_and_is_named(
    kind: str, source: Source, tmp_path: Path
) -> None:
    folder = source(kind)
    before = {path.name for path in folder.iterdir()}
    # Of trainers, other formats and people; a stray shard that no index knows; a name with a break.
    others = ["README.md", "adapter_model.safetensors", "consolidated.safetensors", "model.pt",
              "notes.txt", "optimizer.pt", "pytorch_model.bin", "trainer_state.json", "x\ny.json",
              "training_args.bin"]  # fmt: skip
    for name in others:
        (folder / name).write_bytes(b"{}")
    for name in ("original", "custom_generate"):
        (folder / name).mkdir()
        (folder / name / "generate.py").write_text("")
    (folder / "LICENSE").write_text("free")
    report = erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    names = sorted([*others[:-2], r"'x\ny.json'", "training_args.bin",
                    "original/", "custom_generate/"])  # fmt: skip
    assert list(report.left_behind) == names == report.to_dict()["left_behind"]
    line = report.plan_text.splitlines()[-1]
    assert line.startswith(f"left behind ({len(names)}): ") and line.endswith("and 4 more")
    assert all(name in line for name in names[:8])
    added = {"LICENSE", "quantization_report.json"}
    assert {p.name for p in (tmp_path / "q").iterdir()} == before | added
    (tmp_path / "q" / "notes.txt").write_text("")
    exported = erniequant.export(tmp_path / "q", tmp_path / "plain")
    assert exported.left_behind == ("notes.txt",) == tuple(exported.to_dict()["left_behind"])
    assert {p.name for p in (tmp_path / "plain").iterdir()} == before | {"LICENSE"}
    require_usable(kind, tmp_path / "q")
    require_usable(kind, tmp_path / "plain")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
     "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"],
)  # fmt: skip
def test_a_pointer_is_no_file(kind: str, name: str, source: Source, tmp_path: Path) -> None:
    folder = source(kind)
    (folder / name).write_bytes(POINTER)
    refused = rf"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`"
    for road in (
        lambda: erniequant.quantize(folder, tmp_path / "q", dry_run=True, **OPTIONS),
        lambda: erniequant.quantize(folder, tmp_path / "q", **OPTIONS),
    ):
        with pytest.raises(ErnieQuantError, match=refused):
            road()
    if name != "generation_config.json":
        with pytest.raises(ErnieQuantError, match=refused):
            erniequant.load(folder, device="cpu")
    assert not (tmp_path / "q").exists()


def test_a_pointer_in_a_result_is_no_file(source: Source, tmp_path: Path) -> None:
    erniequant.quantize(source("text"), tmp_path / "q", **OPTIONS)
    (tmp_path / "q" / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ErnieQuantError, match="tokenizer.json is a Git LFS pointer"):
        erniequant.export(tmp_path / "q", tmp_path / "plain")
    assert "tokenizer.json is a Git LFS pointer" in verify(tmp_path / "q").problems[0]


@pytest.mark.parametrize("kind", ["text", "vl"])
def test_fused_experts_are_refused_with_a_command_that_mends_them(
    kind: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(kind)
    fused = tmp_path / "fused"
    auto(kind).from_pretrained(folder).save_pretrained(fused, save_original_format=False)
    roads = [lambda: erniequant.quantize(fused, tmp_path / "q", **OPTIONS)]
    # Text models load as they are; the others differ in more names.
    roads += [lambda: erniequant.load(fused, device="cpu")] if kind == "vl" else []
    for road in roads:
        with pytest.raises(ErnieQuantError, match="holds all experts of a layer in one") as refused:
            road()
    with pytest.raises(ErnieQuantError) as refused:
        roads[0]()
    command = str(refused.value).split("python -c ")[1].split('"')[1]
    assert str(fused) in command
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    made, original = (load_file(d / "model.safetensors") for d in (tmp_path / "NEW", folder))
    assert made.keys() == original.keys()
    assert all(torch.equal(made[n], t) and made[n].dtype == t.dtype for n, t in original.items())
    erniequant.quantize(tmp_path / "NEW", tmp_path / "q", dry_run=True, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_only_code_can_make_is_refused_at_once(
    kind: str, source: Source, tmp_path: Path
) -> None:
    folder = with_code(source(kind))
    (folder / "tokenizer.json").rename(folder / "own_vocabulary.json")
    for more in ({"dry_run": True}, {}):
        with pytest.raises(ErnieQuantError, match="class 'OwnTokenizer', which only its own code"):
            erniequant.quantize(folder, tmp_path / "q", **OPTIONS, **more)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokenizer_at_all(kind: str, source: Source, tmp_path: Path) -> None:
    folder = source(kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    erniequant.export(tmp_path / "q", tmp_path / "plain")
    for made in (tmp_path / "q", tmp_path / "plain"):
        model, tokenizer = erniequant.load(made, device="cpu")
        assert tokenizer is None and torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_tokenizer_is_refused_at_once(kind: str, source: Source, tmp_path: Path) -> None:
    folder = source(kind)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ErnieQuantError, match="no tokenizer can be loaded from"):
        erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_the_model_lacks_are_told_of(kind: str, source: Source, tmp_path: Path) -> None:
    folder, told = source(kind), []
    # The vocabulary of the models is 128, that of the tokenizers less.
    for tokens in (128, 129):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<|{tokens}-{i}|>" for i in range(tokens - len(tokenizer))])
        tokenizer.save_pretrained(folder)
        told.append(erniequant.quantize(folder, tmp_path / "q", dry_run=True, **OPTIONS).plan_text)
    assert "tokenizer" not in told[0]
    assert told[1].endswith("the tokenizer has 129 tokens, the model 128: text with any of the "
                            "extra tokens cannot be run")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["{", '{"max_new_tokens": -3}'])
def test_settings_of_generation_that_transformers_refuses(
    kind: str, content: str, source: Source, tmp_path: Path
) -> None:
    folder = source(kind)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ErnieQuantError, match="generation_config.json"):
        erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_links_as_the_cache_of_the_hub_has_them(
    kind: str, source: Source, tmp_path: Path
) -> None:
    real = source(kind)
    folder = tmp_path / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for path in real.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    erniequant.quantize(folder, tmp_path / "q", **OPTIONS)
    assert not any(path.is_symlink() for path in (tmp_path / "q").iterdir())
    shutil.rmtree(real)
    require_usable(kind, tmp_path / "q")
    with pytest.raises(ErnieQuantError, match="config.json; it is not a checkpoint"):
        erniequant.load(folder, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_no_place_for_the_result(
    kind: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(kind)
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    for src, dst, reason in (
        (folder, folder, "is the source itself"),
        (".", f"../{folder.name}/", "is the source itself"),
        (".", "q", "is inside the source"),
        (f"{folder}/", folder / "a" / "b", "is inside the source"),
    ):
        with pytest.raises(ErnieQuantError, match=reason):
            erniequant.quantize(src, dst, **OPTIONS)
    assert sorted(folder.rglob("*")) == before
    erniequant.quantize(".", "../q", **OPTIONS)
    with pytest.raises(ErnieQuantError, match="is inside the source"):
        erniequant.export("../q", "../q/plain")
    erniequant.export("../q/", "../plain/")
    assert sorted(folder.rglob("*")) == before
    require_usable(kind, tmp_path / "plain")
