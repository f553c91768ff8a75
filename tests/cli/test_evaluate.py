"""`eval perplexity` and `generate`: options reach the library, results reach the user."""

import hashlib
import json

import pytest

import erniequant.generation
from erniequant.generation import Generation

TEXT = "the quick brown fox jumps over the lazy dog " * 5


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(TEXT)
    return file


def test_perplexity_writes_the_contract_json(run, models, text, tmp_path):
    out = tmp_path / "result.json"
    result = run(
        *("eval", "perplexity", "a", "--reference", "bb", "--text", text, "--json", out),
        *("--context", 32, "--stride", 16, "--tokens", 100, "--device", "cpu"),
        *("--dtype", "float32"),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert models == [("a", "cpu", "float32"), ("bb", "cpu", "float32")]
    found = json.loads(out.read_text())
    assert (found["context"], found["stride"], found["bos"]) == (32, 16, False)
    assert found["tokens"] == 99
    assert found["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert set(found["reference"]) == {
        *("perplexity", "ratio", "ratio_stderr", "kl_mean", "kl_p90", "top1_agreement"),
    }
    for value in (found["perplexity"], found["reference"]["perplexity"]):
        assert f"{value:.4f}" in result.stdout


def test_quiet_prints_nothing(run, models, text, tmp_path):
    out = tmp_path / "result.json"
    result = run("eval", "perplexity", "a", "--text", text, "--json", out, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert "reference" not in json.loads(out.read_text())


def test_reference_that_tokenizes_otherwise_is_refused(run, models, text):
    result = run("eval", "perplexity", "a", "--reference", "other-tokens", "--text", text)
    assert result.exit_code == 1
    assert "different tokens" in result.stderr


def test_built_in_text_is_the_default(run, models):
    result = run("eval", "perplexity", "a", "--tokens", 64)
    assert result.exit_code == 0
    assert "63 in 1 windows" in result.stdout


def test_generate_passes_its_options_and_prints_the_answer(run, models, monkeypatch, tmp_path):
    seen = {}

    def generate(model, tokenizer, prompt, **options):
        on_text = options.pop("on_text")
        seen.update(options, prompt=prompt)
        on_text("a sun")
        return Generation("<user>hi", "a sunny day", 3, 4, 0.5)

    monkeypatch.setattr(erniequant.generation, "generate", generate)
    out = tmp_path / "answer.json"
    result = run(
        *("generate", "a", "hi", "--max-tokens", 5, "--temperature", 0.5, "--seed", 3),
        *("--chat-template", "none", "--json", out),
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a sunny day\n", "")
    assert seen == {
        **{"prompt": "hi", "images": (), "max_tokens": 5, "temperature": 0.5, "seed": 3},
        "chat_template": "none",
    }
    assert json.loads(out.read_text())["text"] == "a sunny day"


def test_a_text_is_refused_before_a_model_is_loaded(run, models, tmp_path):
    file = tmp_path / "words.txt.gz"
    file.write_bytes(b"not packed at all")
    result = run("eval", "perplexity", "a", "--text", file, "--tokens", 10)
    assert (result.exit_code, models) == (1, [])
    assert "damaged or cut short" in result.stderr


def test_a_text_at_home(run, models, text, monkeypatch):
    monkeypatch.setenv("HOME", str(text.parent))
    result = run("eval", "perplexity", "a", "--text", "~/words.txt", "--tokens", 64)
    assert (result.exit_code, result.stderr) == (0, "")
