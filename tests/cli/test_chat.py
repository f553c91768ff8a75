"""`chat` on micro models: through a pipe in process, and on a pseudo-terminal with Ctrl-C."""

import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
from typer.testing import CliRunner

from tests.micro_vl import write_image

SILENT = [0, *range(96, 128)]  # tokens without text, which random models prefer
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
POSITIONS = 256


@pytest.fixture(scope="module")
def talkers(packed_ernie, packed_vl, micro_vl, tmp_path_factory):
    """Folders of a text model and of a vision-language model that have a template and say
    letters."""
    home = tmp_path_factory.mktemp("talkers")
    found = {}
    for name, folder in (("text", packed_ernie), ("vl", packed_vl)):
        found[name] = shutil.copytree(folder, home / name)
        for file in TOKENIZER:
            shutil.copy(micro_vl / file, found[name])
        path = found[name] / "generation_config.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**settings, "suppress_tokens": SILENT}))
    return found


@pytest.fixture
def chat(talkers):
    """Run the command on lines from a pipe."""
    from erniequant_cli.main import app

    def run(kind, said, *options):
        fast = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6")
        arguments = ["chat", talkers.get(kind, kind), *fast, *options]
        return CliRunner().invoke(app, [str(a) for a in arguments], input=said)

    return run


def answers(path):
    return [exchange["text"] for exchange in json.loads(path.read_text())["exchanges"]]


def test_lines_of_a_pipe_are_messages(chat, talkers, tmp_path):
    import erniequant
    from erniequant.generation import ChatSession, Sampling

    out = tmp_path / "chat.json"
    # Drawn among all tokens: the likeliest ones of a random model may be the same in every answer.
    settings = ("--system", "be kind", "--temperature", "9", "--seed", "4")
    result = chat("text", "hello\n\n  why?  \nlast", *settings, "--json", out)
    model, tokenizer = erniequant.load(talkers["text"], device="cpu", dtype="float32")
    sampling = Sampling(9.0, None, 4)
    session = ChatSession(model, tokenizer, system="be kind", sampling=sampling, max_new_tokens=6)
    expected = [session.say(text).text for text in ("hello", "why?", "last")]
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    assert len(set(expected)) == 3 and all(expected)
    found = json.loads(out.read_text())
    assert (found["system"], found["model"]) == ("be kind", str(talkers["text"]))
    assert [e["text"] for e in found["exchanges"]] == expected
    assert [e["message"] for e in found["exchanges"]] == ["hello", "why?", "last"]
    assert found["exchanges"][1]["reused_tokens"] > 20
    # Every answer was cut off, which a line on stderr tells and stdout does not.
    assert result.stderr == "cut off after 6 tokens, at --max-new-tokens\n" * 3


def test_quiet_prints_nothing_and_the_end_of_input_is_no_failure(chat, tmp_path):
    out = tmp_path / "chat.json"
    result = chat("text", "hello\n/help\n", "--quiet", "--json", out)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert len(answers(out)) == 1
    assert chat("text", "").exit_code == 0


def test_commands(chat, tmp_path):
    out = tmp_path / "chat.json"
    said = "hello\nhello\n/reset\nhello\n/help\n//help\n/a/b c\n/exit\nnever\n"
    result = chat("text", said, "--json", out)
    assert result.exit_code == 0
    exchanges = json.loads(out.read_text())["exchanges"]
    assert [e["message"] for e in exchanges] == ["hello"] * 3 + ["/help", "/a/b c"]
    assert exchanges[2]["text"] == exchanges[0]["text"]
    assert exchanges[2]["prompt_tokens"] == exchanges[0]["prompt_tokens"]
    assert "the chat begins anew\n" in result.stderr
    for command in ("/image", "/reset", "/help", "/exit"):
        assert f"{command} " in result.stderr
    wrong = chat("text", "/nonsense\nhello\n")
    assert wrong.exit_code == 1 and "there is no command /nonsense" in wrong.stderr
    assert len(wrong.stdout.splitlines()) == 1


def test_images(chat, tmp_path):
    first, second = (write_image(tmp_path / f"{n} x.png", 24, 24, seed=n) for n in (1, 2))
    out = tmp_path / "chat.json"
    result = chat("vl", "what\n", "--image", first, "--image", second, "--json", out)
    assert result.exit_code == 0, result.output
    both = json.loads(out.read_text())["exchanges"][0]
    assert both["images"] == [str(first), str(second)]
    said = f"/image {first}\n/image '{second}'\nwhat\n"
    assert chat("vl", said, "--json", out).exit_code == 0
    assert json.loads(out.read_text())["exchanges"][0]["text"] == both["text"]
    chat("vl", f"/image {first}\n/image\nwhat\nwhat\n", "--json", out)
    none = json.loads(out.read_text())["exchanges"]
    assert none[0]["images"] == [] and none[0]["prompt_tokens"] < both["prompt_tokens"]
    # A file that is not there is told of, and the chat goes on.
    result = chat("vl", "/image none.png\nwhat\n", "--json", out)
    assert result.exit_code == 1 and "there is no image" in result.stderr
    assert answers(out) == [none[0]["text"]]
    refused = chat("vl", "what\n", "--image", "none.png")
    assert (refused.exit_code, refused.stdout) == (1, "")
    refused = chat("text", "what\n", "--image", first)
    assert refused.exit_code == 1 and "the model is text-only" in refused.stderr


def test_a_model_without_a_template_is_one_line(chat, talkers, tmp_path):
    folder = shutil.copytree(talkers["text"], tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    result = chat(folder, "hello\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    for text in ("no chat template", "chat_template.jinja", "erniequant generate"):
        assert text in result.stderr


def test_a_full_context_drops_the_oldest_and_says_so(chat, tmp_path):
    out = tmp_path / "chat.json"
    result = chat("text", "".join(f"{n}{'x' * 40}\n" for n in range(6)), "--json", out)
    exchanges = json.loads(out.read_text())["exchanges"]
    assert result.exit_code == 0 and len(exchanges) == 6
    assert max(e["prompt_tokens"] + e["tokens"] for e in exchanges) <= POSITIONS
    dropped = sum(e["dropped"] for e in exchanges)
    assert dropped > 0
    told = re.findall(r"the context is full; the oldest (\d+) messages were dropped", result.stderr)
    assert sum(map(int, told)) == 2 * dropped


def test_a_message_that_is_too_long_is_one_line_and_1(chat):
    result = chat("text", f"hi\n{'x' * POSITIONS}\nhi\n")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("erniequant: ")]
    assert f"of the model's {POSITIONS} positions" in line


def test_bytes_that_are_no_text_are_one_line(chat, talkers):
    said = "héllo\n".encode() + b"caf\xe9\nhello\n"
    result = chat("text", said)
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2
    assert "character 4 of the message is not text" in result.stderr


def test_sampling_options(chat, tmp_path):
    out = tmp_path / "chat.json"

    def said(*options):
        assert chat("text", "hello\n", *options, "--json", out).exit_code == 0
        return answers(out)

    greedy = said()
    hot = ("--temperature", 5)
    assert said("--temperature", 0) == greedy == said(*hot, "--top-p", 1e-9)
    assert said(*hot, "--seed", 1) == said(*hot, "--seed", 1) != said(*hot, "--seed", 2)


def environment(**changes):
    dropped = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | changes


def command(folder, *options):
    fast = ("--device", "cpu", "--temperature", "0")
    return [sys.executable, "-m", "erniequant", "chat", *map(str, (folder, *fast, *options))]


class Person:
    """Types on a pseudo-terminal and reads what is shown."""

    def __init__(self, *arguments, **changes):
        self.seen = b""
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.execvpe(arguments[0], arguments, environment(**changes))
        ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))

    def types(self, keys):
        # As slow as a person: keys that are pressed before the prompt listens are echoed twice.
        time.sleep(0.3)
        os.write(self.terminal, keys)

    def sees(self, wanted):
        """Wait for bytes; what was shown up to their end."""
        end = time.monotonic() + 120
        while wanted not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.terminal], [], [], 1)[0]:
                self.seen += os.read(self.terminal, 1 << 16)
        shown, _, self.seen = self.seen.partition(wanted)
        return shown + wanted

    def leaves(self):
        """The rest of what is shown, and the exit code."""
        try:
            while block := os.read(self.terminal, 1 << 16):
                self.seen += block
        except OSError:
            pass  # Linux says EIO when the other side is closed
        os.close(self.terminal)
        return self.seen, os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.fixture(scope="module")
def slow_talker(talkers, tmp_path_factory):
    """The text model with so many positions that it talks for a minute, unless it is stopped."""
    folder = shutil.copytree(talkers["text"], tmp_path_factory.mktemp("slow") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 17}))
    settings = json.loads((folder / "generation_config.json").read_text())
    never = {"suppress_tokens": [1, *SILENT], "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings | never))
    return folder


def test_ctrl_c_stops_the_answer_and_not_the_program(slow_talker, tmp_path):
    out = tmp_path / "chat.json"
    options = ("--max-new-tokens", "30000", "--json", out)
    person = Person(*command(slow_talker, *options), TERM="xterm")
    assert b"/help lists commands" in person.sees(b"> ")
    for question in (b"hello", b"go on"):
        person.types(question + b"\r")
        person.sees(b"\x1b[?25h")  # the spinner is gone when the first words come
        person.types(b"\x03")
        person.sees(b"stopped")
        person.sees(b"> ")
    # A line that was begun is thrown away, and the chat goes on.
    person.types(b"half a line")
    person.types(b"\x03")
    person.sees(b"> ")
    person.types(b"/reset\r")
    person.sees(b"anew")
    person.sees(b"> ")
    person.types(b"\x03")
    assert person.leaves()[1] == 0
    exchanges = json.loads(out.read_text())["exchanges"]
    assert [(e["message"], e["finish"]) for e in exchanges] == [
        ("hello", "interrupted"), ("go on", "interrupted"),
    ]  # fmt: skip
    assert all(e["text"] for e in exchanges)


def test_ctrl_d_leaves_a_dumb_terminal_too(talkers):
    person = Person(*command(talkers["text"], "--max-new-tokens", "3"), TERM="dumb")
    shown = person.sees(b"> ")
    person.types(b"hello\r")
    shown += person.sees(b"3 tokens in ")
    shown += person.sees(b"> ")
    person.types(b"\x04")
    rest, code = person.leaves()
    assert code == 0 and b"\x1b[" not in shown + rest


def test_ctrl_c_ends_a_pipe(slow_talker):
    started = subprocess.Popen(
        command(slow_talker, "--max-new-tokens", "30000"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    started.stdin.write(b"hello\n")
    started.stdin.flush()
    # The answer streams through a pipe too.
    assert started.stdout.read(1)
    started.send_signal(2)
    out, complaint = started.communicate(timeout=60)
    assert started.returncode == 130
    assert out.endswith(b"\n") and complaint == b"erniequant: interrupted\n"


def test_closed_streams_end_the_chat(talkers):
    line = " ".join(command(talkers["text"], "--max-new-tokens", "2"))
    done = subprocess.run(["bash", "-c", f"{line} <&-"], capture_output=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    full = f"echo hello | {line} > /dev/full"
    done = subprocess.run(["bash", "-c", full], capture_output=True, env=environment())
    assert done.returncode == 1 and b"cannot print: No space left on device" in done.stderr
    gone = f"printf 'hello\\nwhy\\n' | {line} | true; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", gone], capture_output=True, env=environment())
    assert done.returncode == 0 and b"Traceback" not in done.stderr
