"""docs/format.md against the code: constants, example, and a reader written from it alone."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from erniequant.checkpoint import open_checkpoint
from erniequant.codes import CODE_NAMES, get_code
from erniequant.codes.labels import KEEP_BITS, TOGGLE_BITS
from erniequant.models.header_check import require_sound
from erniequant.packing.decoding import decode_weight, encode_scale, expert_matrices
from erniequant.packing.rotation import pack_signs, random_signs
from erniequant.packing.schema import (
    DENSE_FORMAT_VERSION,
    FORMAT_VERSION,
    TILES,
    MatrixSpec,
    QuantizationMetadata,
    layer_params,
)

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "format.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """Cells of the table that begins with a header row."""
    lines = PAGE[PAGE.index(header) :].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("standalone", HERE / "standalone_reader.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_codes() -> None:
    found = {r[0]: (int(r[1]), int(r[2]), r[3]) for r in rows("| code | bits |")}
    codes = [get_code(name, 12) for name in CODE_NAMES]
    assert found == {c.name: (c.bits, c.weights_per_step, c.label.name) for c in codes}


def test_multipliers() -> None:
    header = "| register length | " + " | ".join(CODE_NAMES) + " |"
    table = rows(header)
    assert [int(r[0]) for r in table] == list(range(8, 17))
    for length, *multipliers in table:
        for name, multiplier in zip(CODE_NAMES, multipliers, strict=True):
            assert int(multiplier, 16) == get_code(name, int(length)).multiplier, (name, length)
    with pytest.raises(Exception, match="register length"):
        get_code("cc2", 17)


def test_label_masks_and_versions() -> None:
    assert f"(p AND 0x{KEEP_BITS:08X}) XOR 0x{TOGGLE_BITS:08X}" in PAGE
    assert f"format, versions {FORMAT_VERSION} and {DENSE_FORMAT_VERSION}" in PAGE
    assert f"## What version {DENSE_FORMAT_VERSION} adds" in PAGE
    assert "`tile` is " + ", ".join(map(str, TILES[:-1])) + f" or {TILES[-1]}" in PAGE


def test_description_in_the_page_parses() -> None:
    import json

    text = PAGE[PAGE.index('"quantization_config": {') : PAGE.index("* `layers` is keyed")]
    settings = json.loads("{" + text[: text.rindex("```")] + "}")["quantization_config"]
    assert QuantizationMetadata.from_dict(settings).to_dict() == settings


def test_what_version_2_adds() -> None:
    import json

    section = PAGE[PAGE.index(f"## What version {DENSE_FORMAT_VERSION} adds") :]
    settings = json.loads("{" + section[section.index('"quant') : section.index("\n```\n")] + "}")
    metadata = QuantizationMetadata.from_dict(settings["quantization_config"])
    assert metadata.to_dict() == settings["quantization_config"]
    params = layer_params(1, 1024, 3072, metadata.layers["0.mlp"], guard="down_proj.weight")
    named = [row[0] for row in rows("| name | type | shape, `E` = 1 |")]
    assert named == [*(name for name in params if name != "down_proj.weight"), "down_proj.weight"]


def test_worked_example(reader: ModuleType) -> None:
    words = np.array([0x01234567, 0x89ABCDEF], dtype=np.uint32)
    code = get_code("cc2", 12)
    state = reader.registers(words, 12, 4)
    weights = decode_weight(
        torch.from_numpy(words.view(np.int32))[None], encode_scale(torch.ones(32, 1)),
        torch.zeros(1, dtype=torch.int32), MatrixSpec("cc2", 12, 32, 1),
    ).flatten()  # fmt: skip
    for step, register, product, pair in rows("| step | register |"):
        t = int(step)
        assert int(register, 16) == state[t]
        assert int(product, 16) == int(state[t]) * code.multiplier % 2**32
        assert [float(v) for v in pair.split(",")] == weights[2 * t : 2 * t + 2].tolist()


# Every register length of every code: a constant that differs in one place would show. The tile
# changes with it, so that registers reach back over one and over several words.
@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("length", range(8, 17))
def test_reader_agrees_to_the_last_bit(reader: ModuleType, name: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    tile, block = TILES[length % 4], (1, 16, 32, 64, 128)[length % 5]
    spec = MatrixSpec(name, length, tile, block)
    inputs, words = 128, spec.conv().words_per_sequence(tile)
    shape = (2, inputs * words)
    packed = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    scale = encode_scale(torch.randn(2 * tile, 1, generator=generator))
    signs = pack_signs(random_signs(inputs, generator))
    ours = decode_weight(packed, scale, signs, spec).numpy()
    theirs = reader.decode(packed.numpy(), scale.numpy(), signs.numpy(), spec.__dict__)
    assert theirs.dtype == np.float32 and np.array_equal(ours, theirs)


# Two layers: of eight experts, of one MLP, or of four text and four vision experts.
@pytest.mark.parametrize(
    ("packed", "matrices"), [("packed_ernie", 48), ("packed_dense", 6), ("packed_vl", 48)]
)
def test_reader_reads_a_checkpoint(
    reader: ModuleType, request: pytest.FixtureRequest, packed: str, matrices: int
) -> None:
    folder = request.getfixturevalue(packed)
    checkpoint = open_checkpoint(folder)
    layers = require_sound(checkpoint).layers
    ours = {name: w for layer in layers for name, w in expert_matrices(checkpoint, layer)}
    theirs = dict(reader.read(folder))
    assert set(ours) == set(theirs) and len(ours) == matrices
    for name, weight in ours.items():
        assert np.array_equal(weight.numpy(), theirs[name]), name


def test_reader_stands_alone(packed_ernie: Path) -> None:
    source = (HERE / "standalone_reader.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M))
    assert imported <= {"json", "sys", "collections", "pathlib", "numpy", "safetensors"}
    assert len(source.splitlines()) < 150
    command = [sys.executable, str(HERE / "standalone_reader.py"), str(packed_ernie)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 48, done.stderr
