"""The Viterbi search on a GPU against the one on the CPU: the same labels and words.

Triton's interpreter rounds products before it adds, a GPU does not, and the CPU's compiler does not
either where it can. So path costs differ in the last bit here, which no label of these data shows.
"""

import numpy as np
import pytest
import torch

from erniequant.codes import REGISTERED, get_code
from erniequant.codes.reference import decode
from erniequant.codes.viterbi import encoder
from erniequant_kernels import viterbi
from erniequant_kernels.viterbi import search_rows, search_rows_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TESTED = [key for key in REGISTERED if key[1] <= 13]
# One weight a step and two; steps of 2, 3 and 4 bits.
SHORT = [("cc2", 8), ("cc2s", 8), ("cc3", 9), ("cc4", 8)]


@pytest.fixture
def few_operations(monkeypatch):
    """Fewer labels a lane are fewer operations, each of which the interpreter takes its time for.
    `test_rows_with_feedback` takes as many as a card does."""
    monkeypatch.setattr(viterbi, "LANE_LABELS", 8)


class Problem:
    """Blocks of rows of some matrices: what a search is given, and what the CPU makes of it."""

    def __init__(self, matrices, rows, tiles, tile, seed=1):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        outputs = tiles * tile
        self.error = normal(matrices, rows, outputs)
        self.aims = self.error + 0.1 * normal(matrices, rows, outputs)
        # What is above the diagonal must not be read.
        above = torch.ones(rows, rows).triu().bool()
        self.feedback = (0.2 * normal(matrices, rows, rows)).masked_fill(above, torch.nan)
        self.scale = (0.2 * normal(matrices, outputs)).exp()
        self.weights = normal(matrices, tiles, tile).exp()

    def arguments(self, device=DEVICE):
        own = self.aims, self.feedback, self.scale, self.weights, self.error
        return [tensor.clone().to(device) for tensor in own]

    def on_cpu(self, code):
        """Words, labels, aims and errors of all matrices."""
        found = []
        for arrays in zip(*self.arguments("cpu"), strict=True):
            aims, feedback, scale, weights, error = (a.numpy() for a in arrays)
            words, labels = encoder(code).encode_rows(aims, feedback, scale, weights, error)
            found.append((words.view(np.int32), labels, aims, error))
        return [torch.from_numpy(np.stack(of_all)) for of_all in zip(*found, strict=True)]

    def searched(self, code, search=search_rows):
        """The same of the search under test."""
        given = self.arguments()
        words, labels = search(*given, code)
        return [tensor.cpu() for tensor in (words, labels, given[0], given[-1])]


def assert_equal(found, expected):
    for name, one, other in zip(
        ("words", "labels", "aims", "errors"), found, expected, strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name, length", TESTED)
@pytest.mark.usefixtures("few_operations")
def test_every_code_finds_the_labels_of_the_cpu(name, length):
    # 32 weights are the shortest tile: the window around the seam goes round four times.
    problem, code = Problem(1, 1, 1, 32, seed=length), get_code(name, length)
    assert_equal(problem.searched(code), problem.on_cpu(code))


@pytest.mark.parametrize("name, length", TESTED)
def test_the_reference_finds_the_labels_of_the_cpu(name, length):
    problem, code = Problem(2, 5, 3, 96), get_code(name, length)
    assert_equal(problem.searched(code, search_rows_reference), problem.on_cpu(code))


@pytest.mark.parametrize("name, length", SHORT)
@pytest.mark.usefixtures("few_operations")
def test_of_equal_paths_the_lowest_register_is_kept(name, length):
    # Targets of zero and equal weights: all costs are exact, and every step has equal ones.
    problem, code = Problem(1, 1, 1, 32), get_code(name, length)
    problem.aims.zero_()
    problem.weights.fill_(1)
    assert_equal(problem.searched(code), problem.on_cpu(code))


@pytest.mark.usefixtures("few_operations")
def test_matrices_of_several_tiles(monkeypatch):
    # Three matrices, two at a time; 96 is no power of two, nor are its 6 words.
    code = get_code("cc2s", 8)
    costs, _ = viterbi.scratch_elements(code, 96)
    monkeypatch.setattr(viterbi, "SCRATCH_BYTES", 2 * 2 * 4 * costs)
    problem = Problem(3, 1, 2, 96)
    assert_equal(problem.searched(code), problem.on_cpu(code))


@pytest.mark.usefixtures("few_operations")
def test_every_matrix_has_its_own_feedback():
    problem, code = Problem(2, 2, 1, 32), get_code("cc2s", 8)
    assert_equal(problem.searched(code), problem.on_cpu(code))


@pytest.mark.parametrize("name", ["cc2", "cc3"])
@pytest.mark.usefixtures("few_operations")
def test_labels_that_do_not_stay_in_registers(name, monkeypatch):
    monkeypatch.setattr(viterbi, "KEPT_LABELS", 0)
    problem, code = Problem(1, 2, 1, 32), get_code(name, 9)
    assert_equal(problem.searched(code), problem.on_cpu(code))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.usefixtures("few_operations")
def test_what_is_not_finite_spoils_its_tile_alone(bad):
    # The second tile of two, in the row that is encoded first.
    problem, code = Problem(1, 2, 2, 32), get_code("cc2s", 8)
    problem.aims[0, -1, 40] = bad
    words, labels, _, error = problem.searched(code)
    expected = problem.on_cpu(code)
    assert torch.equal(words[:, :, 0], expected[0][:, :, 0])
    assert torch.equal(labels[..., :32], expected[1][..., :32])
    assert torch.equal(error[..., :32], expected[3][..., :32])
    # Its words are still those of its labels.
    packed = words[0].transpose(0, 1).flatten(1)
    assert torch.equal(decode(packed, code, 32).T, labels[0])


@pytest.mark.parametrize("name, length", SHORT)
def test_rows_with_feedback(name, length):
    # The last of three rows aims at errors of two others, which shows their order.
    rows = 3 if name == "cc2s" else 1
    problem, code = Problem(1, rows, 1, 32), get_code(name, length)
    assert_equal(problem.searched(code), problem.on_cpu(code))
