"""All commands in a row on a random but real model, as a user would call them."""

import json
from types import SimpleNamespace

import pytest

WORDS = ("It was a bright cold day in April, and the clocks were striking. " * 40).encode()


@pytest.fixture(scope="module")
def chain(tmp_path_factory, speaking_ernie):
    """The model quantised to 3 bits, and a text."""
    from typer.testing import CliRunner

    from erniequant_cli.main import app

    home = tmp_path_factory.mktemp("chain")
    text = home / "words.txt"
    text.write_bytes(WORDS)
    target, report = home / "three-bits", home / "report.json"
    arguments = ["quantize", speaking_ernie, target, "--bits", 3, "--calib", text]
    arguments += ["--calib-samples", 4, "--calib-length", 64, "--effort", "fast"]
    arguments += ["--max-degraded", 100, "--json", report]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    return SimpleNamespace(
        source=speaking_ernie, target=target, text=text, report=report, result=result
    )


def test_quantize_prints_plan_and_summary_and_writes_its_report(chain):
    plan, _, summary = chain.result.stdout.partition("tokens per expert")
    assert "3 bits" in plan
    assert "bits per expert weight" in summary and f"wrote {chain.target}" in summary
    written = json.loads((chain.target / "quantization_report.json").read_text())
    assert json.loads(chain.report.read_text()) == written
    assert f"{written['bits_per_weight']['experts']:.3f} bits per expert weight" in summary


def test_dry_run_prints_the_plan_and_writes_nothing(run, chain, tmp_path):
    result = run("quantize", chain.source, tmp_path / "new", "--bits", 2, "--dry-run")
    assert result.exit_code == 0
    assert "2 bits" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_verify_accepts_it_and_names_the_error(run, chain, tmp_path):
    out = tmp_path / "verify.json"
    result = run("verify", chain.target, "--reference", chain.source, "--json", out)
    assert result.exit_code == 0, result.stdout
    found = json.loads(out.read_text())
    assert found["ok"] is True
    assert len(found["errors"]) == found["decoded_matrices"] == 2 * 4 * 3
    assert f"{found['mean_error']:.5f}" in result.stdout


def test_verify_refuses_a_changed_byte(run, chain, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(chain.target, copy)
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    out = tmp_path / "verify.json"
    result = run("verify", copy, "--json", out)
    assert result.exit_code == 1
    assert shard.name in result.stderr and result.stderr.count("\n") == 1
    assert json.loads(out.read_text())["ok"] is False


def test_inspect_counts_what_is_there(run, chain, tmp_path):
    out = tmp_path / "contents.json"
    result = run("inspect", chain.target, "--json", out)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert found["expert_weights"] == 2 * 4 * 3 * 96 * 128
    assert all(entry["name"] in result.stdout for entry in found["tensors"])
    plain = run("inspect", chain.source)
    assert plain.exit_code == 0 and "16.000 for experts" in plain.stdout


def test_export_is_the_same_model_in_full(run, chain, tmp_path):
    assert run("export", chain.target, tmp_path / "plain", "--to", "fp32").exit_code == 0
    out = tmp_path / "result.json"
    result = run(
        *("eval", "perplexity", tmp_path / "plain", "--reference", chain.target, "--json", out),
        *("--text", chain.text, "--dtype", "float32", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.stderr
    distance = json.loads(out.read_text())["reference"]
    assert distance["ratio"] == pytest.approx(1, abs=1e-5)
    assert distance["top1_agreement"] > 0.99


def test_generate_speaks(run, chain, tmp_path):
    out = tmp_path / "answer.json"
    result = run("generate", chain.target, "hello", "--max-tokens", 4, "--json", out)
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text())["text"] + "\n" == result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "{source}", "{target}", "--bits", "2", "--no-calib"),
        ("quantize", "{target}", "new", "--bits", "2"),
        ("quantize", "nowhere", "new", "--bits", "2"),
        ("verify", "{source}"),
        ("export", "{source}", "new", "--to", "bf16"),
        ("inspect", "nowhere"),
        ("generate", "nowhere", "hello"),
    ],
    ids=" ".join,
)
def test_refusals_are_one_line_and_1(run, chain, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    places = {"source": chain.source, "target": chain.target}
    result = run(*(a.format(**places) for a in arguments))
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("erniequant: ") and "unexpected" not in last
    assert not (tmp_path / "new").exists()
