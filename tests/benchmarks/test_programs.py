"""Every program of benchmarks/ starts, and finds the markers of its tables in its page."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks.pages import DOCS, ROOT, fill, replace_section

PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    # One is not for the hand: others start it.
    if 'if __name__ == "__main__"' in path.read_text("utf-8") and path.name != "run.py"
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert not end.value.code and "usage:" in capsys.readouterr().out


def test_the_list_is_complete() -> None:
    listed = re.findall(r"^\| `([\w.]+)`", (ROOT / "benchmarks/README.md").read_text(), re.M)
    assert sorted(listed) == PROGRAMS


def test_commands_that_pages_name_are_there() -> None:
    pages = [*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "Makefile"]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    named = set(re.findall(r"-m\s+(benchmarks[\w.]+)", text))
    assert "benchmarks.codes.page" in named and named <= set(PROGRAMS)


# The kernels' program writes one section of the codes' page.
@pytest.mark.parametrize(("subject", "others"), [("codes", {"decoding"}), ("wint2", set())])
def test_sections_of_pages_by_name(subject: str, others: set[str]) -> None:
    program = importlib.import_module(f"benchmarks.{subject}.page")
    check_markers(program.PAGE, set(program.SECTIONS) | others)


def test_sections_of_other_pages() -> None:
    from benchmarks.cpu import page as cpu
    from benchmarks.kernels import host, page

    assert cpu.PAGE == page.PAGE == host.PAGE
    of_host = {"host", "host_cpu", "variants"}
    check_markers(page.PAGE, set(page.sections([])) | set(cpu.sections()) | of_host)
    check_markers(DOCS / "vision_language.md", {"perplexity", "paired"})
    check_markers(DOCS / "large_models.md", {"memory", "calibration", "packed"})
    check_markers(ROOT / "README.md", {"demo"})


def check_markers(page: Path, names: set[str]) -> None:
    """The page has these sections and no others, each with something in it."""
    text = page.read_text("utf-8")
    found = re.findall(r"<!-- (\w+):begin -->\n.+?\n<!-- \1:end -->", text, re.DOTALL)
    assert sorted(found) == sorted(names)
    assert text.count("-->") == 2 * len(names)


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("é <!-- a:begin -->\nold\n<!-- a:end -->\n<!-- ab:begin -->x<!-- ab:end -->.")
    # A text that looks like a marker's end or a group of a pattern is put in as it is.
    fill(page, "a", "\n| \\1 | a:end |\n\n")
    expected = (
        "é <!-- a:begin -->\n| \\1 | a:end |\n<!-- a:end -->\n<!-- ab:begin -->x<!-- ab:end -->."
    )
    assert page.read_text("utf-8") == expected
    for damaged in ("", "<!-- a:begin -->", "<!-- a:end --><!-- a:begin -->"):
        with pytest.raises(SystemExit, match="lacks the markers"):
            replace_section(damaged, "a", "")


def test_the_demo_goes_into_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.demo.page import main

    report, readme = tmp_path / "report.md", tmp_path / "README.md"
    report.write_text("| new |\n")
    readme.write_bytes((ROOT / "README.md").read_bytes())
    monkeypatch.setattr(sys, "argv", ["page", str(report), str(readme)])
    main()
    before, _, rest = (ROOT / "README.md").read_text("utf-8").partition("<!-- demo:begin -->")
    after = rest.partition("<!-- demo:end -->")[2]
    assert readme.read_text("utf-8") == (
        f"{before}<!-- demo:begin -->\n| new |\n<!-- demo:end -->{after}"
    )
