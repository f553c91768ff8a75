"""What every command owes its user: quick help with examples, and 2 for a usage error."""

import json
import subprocess
import sys

import pytest

COMMANDS = [
    ("quantize",),
    ("eval", "perplexity"),
    ("eval", "speed"),
    ("bench", "kernels"),
    ("bench", "static"),
    ("bench", "tune"),
    ("generate",),
    ("chat",),
    ("serve",),
    ("inspect",),
    ("verify",),
    ("export",),
    ("demo",),
]
# Any of these costs more than the second that help may take.
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "numba",
    "datasets",
    "triton",
    "safetensors",
    "matplotlib",
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_examples_and_the_shared_options(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    for text in ("Examples", "erniequant " + " ".join(command), "--json", "--quiet"):
        assert text in result.stdout


def test_every_command_is_in_this_list(run):
    from erniequant_cli.main import app, bench_app, eval_app

    found = {(c.name,) for c in app.registered_commands}
    found |= {("eval", c.name) for c in eval_app.registered_commands}
    found |= {("bench", c.name) for c in bench_app.registered_commands}
    assert found == set(COMMANDS)


def test_help_imports_nothing_heavy():
    script = (
        "import json, sys\n"
        "from erniequant_cli.main import app\n"
        f"for command in {COMMANDS!r} + [()]:\n"
        "    try: app([*command, '--help'])\n"
        "    except SystemExit as end: assert end.code in (0, None), (command, end.code)\n"
        f"print('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("quantize", "a"),
        ("quantize", "a", "b"),
        ("quantize", "a", "b", "--bits", "5"),
        ("quantize", "a", "b", "--bits", "2", "--effort", "huge"),
        ("quantize", "a", "b", "--bits", "2", "--threads", "0"),
        ("eval", "perplexity"),
        ("eval", "perplexity", "a", "--context", "1"),
        ("eval", "perplexity", "a", "--text", "x.txt", "--dataset", "y"),
        ("generate", "a"),
        ("chat",),
        ("chat", "a", "--max-new-tokens", "0"),
        ("chat", "a", "--top-p", "1.5"),
        ("export", "a", "b"),
        ("export", "a", "b", "--to", "gguf"),
        ("bench", "kernels", "--shape", "7b"),
        ("bench", "kernels", "--tokens", "1,x"),
        ("bench", "kernels", "--bits", "5"),
        ("bench", "static", "--arch", "75"),
        ("bench", "tune"),
        ("bench", "tune", "--dry-run", "--bits", "5"),
        ("bench", "tune", "--dry-run", "--shape", "7b"),
        ("bench", "tune", "--output", "no-such-folder/tuning.json"),
        ("eval", "speed", "a", "--new", "0"),
        ("demo", "--json", "no-such-folder/report.json"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage" in result.stderr


def test_version(run):
    from importlib.metadata import version

    assert run("--version").stdout == f"erniequant {version('erniequant')}\n"
