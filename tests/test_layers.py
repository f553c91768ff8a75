"""docs/architecture.md says which part of the library imports which; the code is held to it.

Imports are read with `ast`, those inside of functions and of type checking included.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "erniequant": ROOT, "erniequant_kernels": ROOT / "kernels", "erniequant_cli": ROOT / "cli",
    "erniequant_data": ROOT / "calib_data",
}  # fmt: skip
BELOW_EVERYTHING = {"errors", "paths", "progress", "system", "timing", "version"}
# The package itself offers what its parts have, and `python -m erniequant` is the command.
OUTSIDE = {"erniequant", "__main__", "erniequant_data"}
# Top-level folders that are not installed.
BESIDE = {"benchmarks", "examples", "testing", "tests"}


def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def python_files(folder: str) -> list[Path]:
    """Programs and modules anywhere below a top-level folder that is not a package's."""
    return sorted((ROOT / folder).rglob("*.py"))


def part_of(module: str) -> str:
    """The row of the table that a module belongs to."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] or package if package == "erniequant" else package


@pytest.fixture(scope="module")
def graph() -> dict[str, dict[str, str]]:
    """For each part, the parts that it imports, with an example of each."""
    known = modules()
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for module, path in known.items():
        part = found[part_of(module)]
        for target in imported(path, known):
            if part_of(target) != part_of(module):
                part[part_of(target)] = f"{module} imports {target}"
    return found


@pytest.fixture(scope="module")
def table() -> dict[str, set[str]]:
    """Rows of the table of the library, in order: part and what it imports."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## The library")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w./]+)` \|[^|]+\| ([^|]+) \|$", section, re.MULTILINE)
    return {
        part.removesuffix("/").removesuffix(".py"): set(filter("nothing".__ne__, names.split(", ")))
        for part, names in rows
    }


def test_the_table_is_true(graph: dict[str, dict[str, str]], table: dict[str, set[str]]) -> None:
    assert set(table) == set(graph) - OUTSIDE - BELOW_EVERYTHING
    for part, named in table.items():
        found = set(graph[part]) - BELOW_EVERYTHING - OUTSIDE
        assert found == named, [graph[part].get(name, name) for name in found ^ named]


def test_nobody_imports_upward(table: dict[str, set[str]]) -> None:
    below: set[str] = set()
    for part, named in table.items():
        assert named <= below, (part, named - below)
        below.add(part)


def test_there_is_no_cycle(graph: dict[str, dict[str, str]]) -> None:
    parts = {part: set(targets) for part, targets in graph.items() if part not in OUTSIDE}
    list(TopologicalSorter(parts).static_order())
    assert set(graph["errors"]) == set(graph["paths"]) == set(graph["version"]) == set()


def test_no_module_imports_itself_through_others() -> None:
    """Within a part too, but for what a package offers of its own parts."""
    known = modules()
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    edges = {
        module: {target for target in imported(path, known) if target not in packages | {module}}
        for module, path in known.items()
        if module not in packages
    }
    list(TopologicalSorter(edges).static_order())


def test_files_that_the_page_names_are_there() -> None:
    """A name with a folder is below a package; others are anywhere."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    paths = [path.as_posix() for folder in SOURCES.values() for path in folder.rglob("*.py")]
    for name in re.findall(r"[\w/]+\.py\b", text):
        assert any(path.endswith(f"/{name}") for path in paths), name


def test_what_is_installed_needs_nothing_that_is_not() -> None:
    beside = {folder: path for folder in BESIDE for path in python_files(folder)}
    assert set(beside) == BESIDE
    for path in modules().values():
        assert not set(imported(path, beside)), path


def test_benchmarks_need_no_tests() -> None:
    for path in python_files("benchmarks") + python_files("testing") + python_files("examples"):
        assert not set(imported(path, {"tests": ROOT / "tests"})), path


def test_pages_are_not_programs() -> None:
    assert not python_files("docs")


def test_few_modules_stand_alone() -> None:
    """At the top of the library, beside its packages."""
    alone = {path.stem for path in (ROOT / "erniequant").glob("*.py")} - {"__init__", "__main__"}
    assert len(alone) <= 8, sorted(alone)


def test_files_are_short() -> None:
    """One file tells one story."""
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in modules().values()}
    assert max(lengths.values()) <= 400, max(lengths, key=lambda path: lengths[path])
    assert sorted(lengths.values())[len(lengths) // 2] <= 150
    beside = [path for folder in BESIDE for path in python_files(folder)]
    assert max(len(path.read_text("utf-8").splitlines()) for path in beside) <= 400
