"""`erniequant serve` as a command: it prints its plan, and becomes the server."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from erniequant.serving import plan
from erniequant.serving.command import Command
from tests.serving.conftest import CPU, NO_VLLM, VLLM_CPU

Serve = Callable[..., Result]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Programs that would have taken this process's place."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: found.append(arguments))
    return found


@pytest.fixture
def serve(
    divisible: Path, free_port: int, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Serve:
    """Run the command on a machine with vllm-cpu."""
    from erniequant_cli.main import app

    monkeypatch.setattr(plan, "find_installed", lambda: VLLM_CPU)
    monkeypatch.setattr(plan, "this_machine", lambda: CPU)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_PLUGINS", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*options: Any) -> Result:
        arguments = ["serve", divisible, "--port", free_port, *options]
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


def test_it_becomes_the_server(serve: Serve, started: list[Any], divisible: Path) -> None:
    result = serve("--api-key", "sesame", "--", "--seed", "3")
    assert result.exit_code == 0, result.output
    ((program, arguments, environment),) = started
    assert (program, arguments[:3]) == (
        sys.executable, (sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
    )  # fmt: skip
    assert arguments[-2:] == ("--seed", "3") and str(divisible) in arguments
    assert environment["VLLM_API_KEY"] == "sesame" and environment["PATH"] == os.environ["PATH"]
    assert "sesame" not in result.output + str(arguments)
    assert "server   vLLM 0.32.0 on the CPU, at http://127.0.0.1:" in result.stdout
    assert "cut-in-two: ERNIE 4.5 text MoE, erniequant format 1" in result.stdout


def test_a_dry_run_starts_nothing(serve: Serve, started: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = serve("--tp", "2", "--dry-run", "--json", out)
    assert result.exit_code == 0 and not started
    assert "on each of 2 ranks" in result.stdout
    found = json.loads(out.read_text())
    assert (found["engine"], found["ranks"], found["problems"]) == ("vllm", 2, [])
    assert found["command"]["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert found["memory"]["needed"] == 2 * (
        found["memory"]["weights_per_rank"] + 2**30 + int(1.7 * 2**30)
    )
    assert found["command"]["arguments"][:2] == [sys.executable, "-m"]


def test_problems_are_lines_and_nothing_is_started(
    serve: Serve, started: list[Any], tmp_path: Path
) -> None:
    result = serve("--tp", "4", "--quiet", "--json", tmp_path / "plan.json")
    assert (result.exit_code, result.stdout, started) == (1, "", [])
    (line,) = result.stderr.splitlines()
    assert line.startswith("erniequant: layer 1: gate_up_proj has tiles of 64 outputs")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [f"erniequant: {problem}" for problem in found["problems"]] == [line]
    assert found["memory"] is None


def test_it_says_when_it_is_not_vllm(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_installed", lambda: NO_VLLM)
    result = serve("--dry-run")
    assert "server   transformers 5.20.0's own server on the CPU" in result.stdout
    assert "note: it answers one request at a time" in result.stderr


@pytest.mark.parametrize("options", [("extra",), ("--engine", "sglang"), ("--tp", "0")])
def test_usage(serve: Serve, options: tuple[str, ...], started: list[Any]) -> None:
    assert serve(*options).exit_code == 2 and not started


def test_the_environment_reaches_the_program(tmp_path: Path) -> None:
    """In a process of its own, which the program replaces: its exit code is the program's."""
    out = tmp_path / "seen"
    code = (
        f"import os; open({str(out)!r}, 'w').write(os.environ['VLLM_API_KEY']); raise SystemExit(7)"
    )
    command = Command((sys.executable, "-c", code), {"VLLM_API_KEY": "sesame"})
    child = os.fork()
    if child == 0:  # pragma: no cover
        command.run()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert out.read_text() == "sesame"
