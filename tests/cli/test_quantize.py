"""`quantize`: options reach the library, degraded results are seen, the plan comes before the
work."""

import importlib
import json
from pathlib import Path

import pytest

DEFAULTS = {
    "bits": 2,
    "format": "native",
    "code": None,
    "k_order": None,
    "w4_layers": None,
    "calib": "builtin",
    "calib_samples": 128,
    "calib_length": 1024,
    "chat_template": "apply",
    "no_calib": False,
    "effort": "standard",
    "tune": "none",
    "sensitivity": "activation",
    "search": "cpu",
    "max_tp": 2,
    "device": "auto",
    "threads": None,
    "seed": 0,
    "work_dir": None,
    "max_memory": None,
    "resume": None,
    "dry_run": False,
    "max_degraded": 0,
    "engine": "local",
    "ray_address": None,
}
OTHERS = {
    "bits": 4,
    "format": "fastdeploy-wint2",
    "code": "cc4",
    "k_order": "plain",
    "w4_layers": 2,
    "calib": "words.txt",
    "calib_samples": 3,
    "calib_length": 64,
    "chat_template": "none",
    "no_calib": True,
    "effort": "max",
    "tune": "model",
    "sensitivity": "gradient",
    "search": "cuda",
    "max_tp": 4,
    "device": "cpu",
    "threads": 1,
    "seed": 9,
    "work_dir": Path("elsewhere"),
    "max_memory": "8GB",
    "resume": True,
    "dry_run": True,
    "max_degraded": 5,
    "engine": "ray",
    "ray_address": "10.0.0.1:6379",
}


def test_defaults_are_those_of_the_contract(run, library):
    assert run("quantize", "a", "b", "--bits", 2, "--quiet").exit_code == 0
    src, dst, options = library.seen
    assert (src, dst) == ("a", "b")
    del options["progress"]
    assert options == DEFAULTS


def test_every_option_reaches_the_library(run, library):
    arguments = []
    for name, value in OTHERS.items():
        option = "--" + name.replace("_", "-")
        arguments += [option] if value is True else [option, value]
    assert run("quantize", "a", "b", *arguments, "--quiet").exit_code == 0
    del library.seen[2]["progress"]
    assert library.seen[2] == OTHERS
    assert all(OTHERS[name] != default for name, default in DEFAULTS.items())
    run("quantize", "a", "b", "--bits", 2, "--restart", "--quiet")
    assert library.seen[2]["resume"] is False


def test_ctrl_c_says_how_to_go_on(run, library, monkeypatch):
    module = importlib.import_module("erniequant.quantization.pipeline")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantize", interrupted)
    result = run("quantize", "a", "b", "--bits", 2)
    assert result.exit_code == 130
    assert result.stderr.strip() == (
        "erniequant: interrupted; repeat the command to continue where it stopped"
    )


# 1 of 0 allowed, 3 of 2, as many as allowed, none.
@pytest.mark.parametrize(
    ("degraded", "allowed", "code"), [(1, 0, 3), (3, 2, 3), (2, 2, 0), (0, 0, 0)]
)
def test_too_many_degraded_matrices_exit_with_3(run, library, tmp_path, degraded, allowed, code):
    library.degraded = degraded
    out = tmp_path / "report.json"
    options = ("--bits", 3, "--max-degraded", allowed, "--json", out, "--quiet")
    result = run("quantize", "a", "b", *options)
    assert result.exit_code == code
    assert (f"{degraded} expert matrices are degraded" in result.stderr) == (code == 3)
    assert json.loads(out.read_text()) == {"degraded": degraded}


def test_every_python_option_has_a_command_line_one():
    import inspect

    from erniequant.quantization.pipeline import quantize

    # A format that has options for the command gives them parameters of their own.
    python_only = {"src", "dst", "progress", "format_options"}
    options = set(inspect.signature(quantize).parameters) - python_only
    assert options == set(DEFAULTS)
