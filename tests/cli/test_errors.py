"""How failures reach a user: one line on stderr, an exit code, a traceback only when asked for."""

import importlib
import os
import subprocess
import sys

import pytest

from erniequant.errors import ErnieQuantError


@pytest.fixture
def failing(monkeypatch, run):
    """Run a command whose library call raises `error`."""

    def start(error):
        def load(*_, **__):
            raise error

        monkeypatch.setattr(importlib.import_module("erniequant.formats.verbs"), "load", load)
        return run("generate", "some-model", "hello")

    return start


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ErnieQuantError("no config.json in m: give a\ncheckpoint folder"), "no config.json in m"),
        (OSError(28, "No space left on device", "dst"), "No space left on device"),
        (MemoryError(), "out of memory: the work did not fit"),
        (KeyError("gate"), "unexpected KeyError: 'gate' (ERNIEQUANT_DEBUG=1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failure_is_one_line_and_1(failing, error, line):
    result = failing(error)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("erniequant: ") and line in result.stderr
    assert result.stderr.count("\n") == 1


def test_interrupt_is_one_line_and_130(failing):
    result = failing(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "erniequant: interrupted\n")


def test_debug_lets_the_traceback_through(failing, monkeypatch):
    monkeypatch.setenv("ERNIEQUANT_DEBUG", "1")
    error = ErnieQuantError("broken")
    assert failing(error).exception is error


@pytest.mark.parametrize("debug", [False, True])
def test_in_a_real_process(tmp_path, debug):
    environment = {k: v for k, v in os.environ.items() if k != "ERNIEQUANT_DEBUG"}
    if debug:
        environment["ERNIEQUANT_DEBUG"] = "1"
    command = "import sys; from erniequant_cli.main import main; sys.exit(main())"
    arguments = ["eval", "perplexity", "model", "--text", str(tmp_path / "missing.txt")]
    out = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert out.returncode == 1
    assert out.stdout == ""
    assert ("Traceback" in out.stderr) == debug
    if not debug:
        assert out.stderr.startswith("erniequant: cannot read") and out.stderr.count("\n") == 1
        assert "\x1b" not in out.stderr, "no colour codes where stderr is not a terminal"
