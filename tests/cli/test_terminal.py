"""Real processes on terminals that cannot print everything, are narrow or dumb, or go away: the
work is done, and the exit code says so."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from types import SimpleNamespace

import pytest

FAST = ("--bits", "2", "--no-calib", "--effort", "fast", "--max-tp", "1")
ANSI = re.compile(rb"\x1b")


def environment(**changes):
    dropped = ("PYTHONIOENCODING", "PYTHONUTF8", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("LC_")}
    kept |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return kept | changes


def start(*arguments, shell="", **changes):
    """Run `python -m erniequant`, in a shell with redirections if any are given."""
    command = [sys.executable, "-m", "erniequant", *map(str, arguments)]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(command, capture_output=True, env=environment(**changes), timeout=300)


def on_a_terminal(*arguments, columns, **changes):
    """Run it on a pseudo-terminal; everything that it shows, and the exit code."""
    command = [sys.executable, "-m", "erniequant", *map(str, arguments)]
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, environment(**changes))
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = b""
    try:
        while block := os.read(terminal, 1 << 16):
            shown += block
    except OSError:
        pass  # Linux says EIO when the other side is closed
    os.close(terminal)
    return SimpleNamespace(
        shown=shown, returncode=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    )


def test_quantise_prints_in_an_encoding_without_its_characters(micro_ernie, tmp_path):
    # A name with a byte that is no text.
    folder, out = tmp_path / os.fsdecode(b"\xff2bit"), tmp_path / "report.json"
    done = start("quantize", micro_ernie, folder, *FAST, "--json", out, PYTHONIOENCODING="gbk")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("gbk")
    assert "error: tr(G E H E') / tr(G W H W')" in text
    assert text.endswith("\\udcff2bit\n")
    report = (folder / "quantization_report.json").read_text()
    assert json.loads(out.read_text()) == json.loads(report)
    assert (folder / "config.json").is_file(), "the last file of a complete result"


def test_closed_streams_neither_stop_the_work_nor_get_into_it(run, micro_vl, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = start("quantize", micro_vl, tmp_path / "a", *FAST, shell=">&- <&-", **ascii_only)
    assert done.returncode == 1
    assert done.stderr == b"erniequant: cannot print: it is closed; everything else is done\n"
    # The number of a closed stream goes to the next file that is opened, such as one of weights.
    assert run("verify", tmp_path / "a").exit_code == 0


def test_a_full_disk_behind_stdout_is_one_line_and_1(packed_ernie, tmp_path):
    out = tmp_path / "out.json"
    done = start("inspect", packed_ernie, "--json", out, shell="> /dev/full")
    assert done.returncode == 1
    assert (
        done.stderr
        == b"erniequant: cannot print: No space left on device; everything else is done\n"
    )
    assert json.loads(out.read_text())["tensors"]


def test_a_reader_that_goes_away_changes_nothing(packed_ernie):
    done = start("inspect", packed_ernie, shell="| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1


def test_a_refusal_needs_no_stderr():
    assert start("inspect", "nowhere", shell="2>&- >&-").returncode == 1


def test_narrow_terminals_show_every_number(micro_dense, tmp_path):
    changes = {"TERM": "xterm", "PYTHONIOENCODING": "ascii"}
    done = on_a_terminal("quantize", micro_dense, tmp_path / "a", *FAST, columns=20, **changes)
    shown = done.shown.decode("ascii")
    assert done.returncode == 0, shown
    assert (tmp_path / "a" / "config.json").is_file()
    assert "3/3" in shown, "the bar says how far it is"
    # Two means for each of three layers, five digits each, none cut.
    assert len(re.findall(r"0\.\d{5}\D", shown)) == 6


def test_dumb_terminals_get_no_codes(packed_vl):
    done = on_a_terminal("inspect", packed_vl, columns=20, TERM="dumb")
    assert done.returncode == 0
    assert b"bits per weight" in done.shown and not ANSI.search(done.shown)


def test_a_terminal_of_no_columns_shows_the_reason():
    # Pseudo-terminals have none until someone sets it; where COLUMNS says so too, rich prints
    # nothing at all.
    changes = {"COLUMNS": "0", "NO_COLOR": "1", "TERM": "xterm"}
    refused = on_a_terminal("inspect", "nowhere", columns=0, **changes)
    assert refused.returncode == 1 and not ANSI.search(refused.shown)
    assert refused.shown.startswith(b"erniequant: no folder nowhere")


@pytest.mark.parametrize("module", ["erniequant", "erniequant_cli", "erniequant_cli.main"])
def test_modules_are_the_command(module):
    def ask(*arguments):
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True, text=True, env=environment(),
        )  # fmt: skip

    assert ask("--version").stdout.startswith("erniequant ")
    usage = ask("quantize", "a")
    assert usage.returncode == 2 and f"python -m {module} quantize" in usage.stderr
