"""`generate` on real micro models: warnings before a surprise, and refusals in one line."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import erniequant.generation
from erniequant.errors import ErnieQuantError
from erniequant.generation import Generation
from tests.micro_vl import PATCH, write_image

KINDS = ("text", "vl", "dense")
POSITIONS = 24  # of every speaker


@pytest.fixture(params=KINDS)
def speaker(request, speakers):
    return speakers[request.param]


def with_template(folder, target, template):
    """A copy whose tokenizer has this chat template."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(template)
    return target


def test_an_answer_that_fits_comes_without_a_warning(run, speaker):
    # "hi" is two tokens; with all that is left the last position is filled and none beyond it.
    options = ("--chat-template", "none", "--max-tokens", POSITIONS - 2)
    result = run("generate", speaker, "hi", *options)
    assert (result.exit_code, result.stderr) == (0, "")


def test_max_tokens_beyond_the_positions_is_one_warning(run, speaker):
    options = ("--chat-template", "none", "--max-tokens", POSITIONS - 1)
    result = run("generate", speaker, "hi", *options)
    assert result.exit_code == 0
    assert result.stderr.startswith("erniequant: warning: ") and result.stderr.count("\n") == 1
    assert f"at most {POSITIONS - 2} tokens" in result.stderr
    quiet = run("generate", speaker, "hi", *options, "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_prompt_that_fills_the_positions_is_one_warning(run, speaker):
    options = ("--chat-template", "none", "--max-tokens", 1)
    result = run("generate", speaker, "x" * POSITIONS, *options)
    assert result.exit_code == 0
    assert "prompt alone takes 24 of the model's 24 positions" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_image_counts_by_its_longer_side(run, speakers, tmp_path):
    # 16 x 8 patches are 8 x 4 = 32 tokens but 8 positions; with begin, end and one letter 11 are
    # used. Counting tokens would warn here.
    image = write_image(tmp_path / "wide.png", 16 * PATCH, 8 * PATCH)
    options = ("--image", image, "--chat-template", "none", "--max-tokens")
    fits = run("generate", speakers["vl"], "x", *options, POSITIONS - 11)
    assert (fits.exit_code, fits.stderr) == (0, "")
    beyond = run("generate", speakers["vl"], "x", *options, POSITIONS - 10)
    assert beyond.exit_code == 0 and f"at most {POSITIONS - 11} tokens" in beyond.stderr


# A syntax error, an error that the template raises itself, a variable that is not there, and a
# template that makes nothing of its messages.
@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}", "{{ raise_exception('no\nusers') }}", "{{ none.x.y }}", "{{ '' }}"],
)
def test_a_broken_chat_template_is_one_line(run, speaker, tmp_path, template):
    broken = with_template(speaker, tmp_path / "broken", template)
    result = run("generate", broken, "hi", "--max-tokens", 2)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("erniequant: the chat template")
    assert "--chat-template none" in result.stderr and result.stderr.count("\n") == 1
    plain = run("generate", broken, "hi", "--max-tokens", 2, "--chat-template", "none")
    assert plain.exit_code == 0


def test_a_broken_chat_template_with_an_image_is_one_line(run, speakers, tmp_path):
    broken = with_template(speakers["vl"], tmp_path / "broken", "{{ none.x.y }}")
    image = write_image(tmp_path / "a.png", 56, 56)
    result = run("generate", broken, "hi", "--image", image)
    assert result.exit_code == 1 and "unexpected" not in result.stderr
    assert "chat template" in result.stderr and result.stderr.count("\n") == 1


# Beyond float32 once logits are divided by it; nothing to divide by; the rest is a usage error.
@pytest.mark.parametrize(("value", "code"), [("1e-300", 0), ("inf", 1), ("nan", 2), ("-1", 2)])
def test_temperatures_of_any_size(run, speakers, value, code):
    result = run("generate", speakers["text"], "hi", "--max-tokens", 2, "--temperature", value)
    assert result.exit_code == code
    assert "unexpected" not in result.stderr


def test_a_prompt_in_bytes_that_are_no_text_is_one_line(run, speaker):
    result = run("generate", speaker, os.fsdecode(b"caf\xe9"))
    assert result.exit_code == 1
    assert "character 4 of the prompt is not text" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_prompt_in_utf_8_is_read_in_a_locale_of_ascii(run, speaker, tmp_path):
    # As Python hands it over there: one surrogate for every byte that is not ASCII.
    prompt = "café".encode().decode("ascii", "surrogateescape")
    out = tmp_path / "answer.json"
    options = ("--chat-template", "none", "--max-tokens", 1, "--json", out)
    assert run("generate", speaker, prompt, *options).exit_code == 0
    assert json.loads(out.read_text())["prompt"] == "café"


def test_an_image_for_a_model_of_text_is_one_line(run, speakers, tmp_path):
    image = write_image(tmp_path / "a.png", 56, 56)
    for kind in ("text", "dense"):
        result = run("generate", speakers[kind], "hi", "--image", image)
        assert result.exit_code == 1 and "is text-only" in result.stderr


@pytest.fixture
def stages(models, monkeypatch):
    """`generate` that says three pieces, of control characters among others; gives what was on
    stdout after each, and a failure to raise after the second."""
    found = SimpleNamespace(shown=[], failure=None)

    def generate(model, tokenizer, prompt, *, on_text, **options):
        for piece in ("a su", "nny\x1b", " day"):
            if on_text is not None:
                on_text(piece)
            found.shown.append(sys.stdout.buffer.getvalue())
            if found.failure is not None and len(found.shown) == 2:
                raise found.failure
        return Generation("hi", "a sunny\x1b day", 3, 4, 0.5)

    monkeypatch.setattr(erniequant.generation, "generate", generate)
    return found


def test_an_answer_is_printed_as_it_comes(run, stages, tmp_path):
    result = run("generate", "a", "hi", "--json", tmp_path / "out.json")
    assert result.stdout == "a sunny\\x1b day\n"
    assert stages.shown == [b"a su", b"a sunny\\x1b", b"a sunny\\x1b day"]
    assert json.loads((tmp_path / "out.json").read_text())["text"] == "a sunny\x1b day"
    stages.shown.clear()
    quiet = run("generate", "a", "hi", "--quiet")
    assert (quiet.stdout, set(stages.shown)) == ("", {b""})


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ErnieQuantError("no more")])
def test_a_failure_within_an_answer_begins_a_line(run, stages, failure):
    stages.failure = failure
    result = run("generate", "a", "hi")
    assert result.exit_code == (130 if isinstance(failure, KeyboardInterrupt) else 1)
    assert result.stdout == "a sunny\\x1b\n"
    assert result.stderr.count("\n") == 1


def test_json_on_stdout_comes_before_the_answer(speakers):
    command = (sys.executable, "-m", "erniequant", "generate", speakers["text"], "hi",
               "--max-tokens", "5", "--json", "/dev/stdout")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(command, capture_output=True, env=environment, check=True).stdout
    found, end = json.JSONDecoder().raw_decode(out.decode())
    assert out.decode()[end:] == "\n" + found["text"] + "\n"
