"""`~` is the home folder wherever a path is given, to commands and to functions alike."""

import json
import shutil

import pytest
from typer.testing import CliRunner

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.paths import expanded

FAST = {"bits": 2, "no_calib": True, "max_tp": 1, "effort": "fast"}
OPTIONS = ("--bits", "2", "--no-calib", "--effort", "fast", "--max-tp", "1")
KINDS = {"text": "micro_source", "vl": "micro_vl", "dense": "micro_dense"}


@pytest.fixture(params=KINDS)
def home(request, tmp_path, monkeypatch):
    """A home folder with a model of every kind in turn, a text and an image; the working folder is
    another, so that nothing is found by chance."""
    from testing.micro_model import add_tokenizer
    from tests.micro_vl import write_image

    folder = tmp_path / "home"
    shutil.copytree(request.getfixturevalue(KINDS[request.param]), folder / "model")
    if request.param == "dense":
        add_tokenizer(folder / "model")
    (folder / "words.txt").write_text("It was a bright cold day in April. " * 4)
    write_image(folder / "a.png", 56, 56)
    (folder / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "text": "a cat"}) + "\n")
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    monkeypatch.setenv("HOME", str(folder))
    yield folder
    assert not list(away.iterdir()), "nothing may be called ~"


def test_every_path_of_every_command(home):
    from erniequant_cli.main import app

    def run(*arguments):
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output

    quantised = ("quantize", "~/model", "~/new/2bit", *OPTIONS)
    run(*quantised, "--work-dir", "~/work", "--json", "~/quantize.json")
    run("inspect", "~/new/2bit", "--json", "~/inspect.json")
    run("verify", "~/new/2bit", "--reference", "~/model", "--json", "~/verify.json")
    run("export", "~/new/2bit", "~/plain", "--to", "bf16", "--json", "~/export.json")
    vision = (home / "model" / "preprocessor_config.json").exists()
    images = ("--images", "~/pairs.jsonl") if vision else ()
    evaluated = ("eval", "perplexity", "~/new/2bit", "--reference", "~/plain", *images)
    run(*evaluated, "--text", "~/words.txt", "--json", "~/perplexity.json")
    short = ("--prompt", "4", "--new", "2", "--repetitions", "1")
    run("eval", "speed", "~/new/2bit", "--reference", "~/model", *short, "--json", "~/speed.json")
    image = ("--image", "~/a.png") if vision else ()
    run("generate", "~/plain", "hi", *image, "--max-tokens", "2", "--json", "~/generate.json")
    written = {path.stem for path in home.glob("*.json")}
    names = ("quantize", "inspect", "verify", "export", "perplexity", "speed", "generate")
    assert written == set(names)
    assert (home / "plain" / "config.json").is_file()


def test_every_path_of_every_function(home):
    from erniequant.evaluate import image_perplexity
    from erniequant.formats.verbs import inspect, verify
    from erniequant.generation import generate

    erniequant.quantize("~/model", "~/2bit", work_dir="~/work", **FAST)
    erniequant.export("~/2bit", "~/plain", "bf16")
    assert inspect("~/2bit").tensors and verify("~/2bit", reference="~/model").ok
    model, tokenizer = erniequant.load("~/2bit", device="cpu")
    if (home / "model" / "preprocessor_config.json").exists():
        assert generate(model, tokenizer, "hi", images=["~/a.png"], max_tokens=1).text is not None
        assert image_perplexity(model, tokenizer, "~/pairs.jsonl").records == 1


def test_nothing_else_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("baidu/ERNIE-4.5-21B-A3B-PT", "./~/x", "a~b", "/a/~", "~no-such-user/x"):
        assert str(expanded(path)) == path.removeprefix("./")
    with pytest.raises(ErnieQuantError, match="no folder ~no-such-user/x"):
        erniequant.load("~no-such-user/x")
