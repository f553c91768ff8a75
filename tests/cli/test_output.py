"""How commands write, in process: every command in every encoding, and results that cannot be
handed over."""

import errno
import io
import json
import os
import sys

import pytest

from erniequant_cli import options
from erniequant_cli.terminal import Output, any_terminal, encodable, printable, say
from tests.cli.test_help import COMMANDS

# What two bytes can say, what one can, and next to nothing.
ENCODINGS = ("gbk", "cp1252", "ascii")
SOURCES = {"text": "micro_ernie", "vl": "micro_vl", "dense": "micro_dense"}


@pytest.fixture
def printed(monkeypatch):
    """Run a command on stdout and stderr of an encoding that raise; exit code and both texts."""
    from erniequant_cli.main import app

    def start(encoding, *arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as end:
            app([str(a) for a in arguments])
        return end.value.code, *(s.buffer.getvalue().decode(encoding) for s in streams)

    return start


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["text", "vl", "dense"])
def test_every_command_prints_in_any_encoding(printed, speakers, request, tmp_path, kind, encoding):
    model, source = speakers[kind], request.getfixturevalue(SOURCES[kind])
    text = tmp_path / "words.txt"
    text.write_text("It was a bright cold day in April. " * 4)
    evaluated = ("eval", "perplexity", model, "--text", text, "--reference", model)
    timed = ("eval", "speed", model, "--prompt", 4, "--new", 2, "--repetitions", 1)
    for arguments in (
        (
            "quantize",
            source,
            tmp_path / "2bit",
            "--bits",
            2,
            "--no-calib",
            "--effort",
            "fast",
            "--max-tp",
            1,
        ),
        ("inspect", model),
        ("verify", model),
        evaluated,
        timed,
        ("generate", model, "hi", "--max-tokens", 2),
        ("export", model, tmp_path / "наружу", "--to", "bf16"),
    ):
        code, out, err = printed(encoding, *arguments)
        assert (code, err) == (0, ""), arguments
        assert out
    assert (tmp_path / "наружу" / "config.json").is_file()
    code, out, _ = printed("ascii", *evaluated)
    assert "+-" in out and "..." in out and "\\u" not in out
    code, out, err = printed(encoding, "inspect", "нет–такой")
    assert (code, out) == (1, "") and err.startswith("erniequant: no folder")


@pytest.mark.parametrize("command", [(), *COMMANDS], ids=" ".join)
def test_help_prints_in_ascii(printed, command):
    code, out, _ = printed("ascii", *command, "--help")
    assert code == 0 and "Usage" in out


def test_a_usage_error_prints_in_ascii(printed):
    code, out, err = printed("ascii", "quantize", "a", "b", "--bits", "пять")
    assert (code, out) == (2, "") and "Usage" in err


def test_characters_give_way_to_readable_ones():
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    # Known; compatible with a plain one; neither; half of a pair; a byte of a file's name.
    text = "1 ± 2 × 3…ᵀ ² ſ 你 \ud83d \udcff"
    assert encodable(text, narrow) == "1 +- 2 x 3...' 2 s \\u4f60 \\ud83d \\udcff"
    wide = io.TextIOWrapper(io.BytesIO(), "utf-8")
    assert encodable(text, wide) == "1 ± 2 × 3…ᵀ ² ſ 你 \\ud83d \\udcff"


def test_what_a_user_chose_for_such_characters_is_kept():
    raw = io.BytesIO()
    Output(stream := io.TextIOWrapper(raw, "ascii", "replace")).write("±")
    stream.flush()
    assert raw.getvalue() == b"?"


def test_models_do_not_command_the_terminal(capsys):
    assert printable("a\x1b[31mb\r\x9b\tc\n") == "a\\x1b[31mb\\r\\x9b\tc\n"
    say("\x1b]0;title\x07")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\n"


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ValueError("I/O operation on closed file"), "I/O operation on closed file"),
    ],
    ids=str,
)
def test_streams_that_fail_never_raise(monkeypatch, error, said):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    with any_terminal() as lost:
        assert lost() is None
        say("one")
        say("two")
        assert lost() == said


def test_a_table_that_cannot_be_drawn_leaves_the_exit_code_alone(run, library, monkeypatch):
    monkeypatch.setattr("erniequant_cli.tables.print_quantization", lambda *_: 1 / 0)
    for degraded, code in ((0, 0), (2, 3)):
        library.degraded = degraded
        result = run("quantize", "a", "b", "--bits", 2)
        assert result.exit_code == code
        assert "cannot print: unexpected ZeroDivisionError" in result.stderr


def test_ctrl_c_while_printing_says_that_the_work_is_done(run, library, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("erniequant_cli.tables.print_quantization", interrupted)
    out = tmp_path / "report.json"
    result = run("quantize", "a", "b", "--bits", 2, "--json", out)
    assert result.exit_code == 130
    assert result.stderr == "erniequant: interrupted while printing; everything else is done\n"
    assert json.loads(out.read_text()) == {"degraded": 0}


def test_a_folder_that_vanished_is_one_line_and_the_model_is_complete(
    run, library, monkeypatch, tmp_path
):
    folder = tmp_path / "gone"
    folder.mkdir()
    # It goes away while the library works.
    monkeypatch.setattr(library, "work", folder.rmdir)
    result = run("quantize", "a", "b", "--bits", 2, "--json", folder / "r.json", "--quiet")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "gone/r.json: No such file" in result.stderr and "b is complete" in result.stderr


def test_a_full_disk_leaves_the_json_of_before(files_of_at_most, tmp_path):
    from erniequant.errors import ErnieQuantError

    path = tmp_path / "result.json"
    path.write_text("before")
    with files_of_at_most(100), pytest.raises(ErnieQuantError, match="File too large"):
        options.write_json(path, {"a": "b" * 1000})
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["result.json"]


def test_json_goes_through_links_and_into_pipes(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("before")
    link.symlink_to(target)
    options.write_json(link, {"name": "\udcff"})
    assert link.is_symlink() and json.loads(target.read_text()) == {"name": "\udcff"}
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    options.write_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 1000)) == {"a": 1}
    os.close(reader)


def test_json_on_stdout_is_not_cut_off_from_it(capfd):
    options.write_json(options.Path("/dev/stdout"), {"a": 1})
    print("after")
    assert capfd.readouterr().out == '{\n  "a": 1\n}\nafter\n'


@pytest.mark.parametrize("target", ["{home}", "{home}/no-such-folder/r.json"])
def test_what_cannot_become_a_file_is_refused_before_the_work(run, library, tmp_path, target):
    result = run("quantize", "a", "b", "--bits", 2, "--json", target.format(home=tmp_path))
    assert result.exit_code == 2 and library.seen is None
