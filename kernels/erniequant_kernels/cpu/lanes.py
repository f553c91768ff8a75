"""How the words of packed rows lie in vector lanes.

A lane holds a *group*: one 32-bit word where the step divides 32, else three bytes. All steps of a
group are cut out of its lane and the bits before it by constant shifts, so no weight changes lanes;
only 3-byte groups are put together from words first.
"""

from dataclasses import dataclass

from erniequant.codes.spec import WORD_BITS, ConvolutionalCode


@dataclass(frozen=True)
class LanePlan:
    """Lanes of one *pass*: ``rows`` input rows that are decoded together.

    A sequence of few groups leaves lanes free, which then hold the next rows.
    """

    code: ConvolutionalCode
    tile: int
    lanes: int
    rows: int

    @property
    def group_bits(self) -> int:
        """Bits of a group."""
        return WORD_BITS if WORD_BITS % self.code.step_bits == 0 else 24

    @property
    def steps(self) -> int:
        """Steps of a group."""
        return self.group_bits // self.code.step_bits

    @property
    def group_weights(self) -> int:
        """Weights of a group: consecutive outputs."""
        return self.steps * self.code.weights_per_step

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return self.tile // self.group_weights

    @property
    def words(self) -> int:
        """Words of one row."""
        return self.code.words_per_sequence(self.tile)

    @property
    def vectors(self) -> int:
        """Vectors that hold the groups of a pass."""
        return self.rows * self.groups // self.lanes

    def row(self, lane: int) -> int:
        """The row of the pass that a lane, counted through all vectors, belongs to."""
        return lane // self.groups

    def newest(self, lane: int) -> tuple[int, int]:
        """The word of the pass with the last bit of a lane's group, and the bits after it."""
        end = (lane % self.groups + 1) * self.group_bits
        word = (end - 1) // WORD_BITS
        return self.row(lane) * self.words + word, WORD_BITS * (word + 1) - end

    def before(self, word: int, count: int) -> int:
        """The word ``count`` before a word of the pass; sequences are circular."""
        row, place = divmod(word, self.words)
        return row * self.words + (place - count) % self.words

    def shift(self, step: int) -> int:
        """Bits of the group after a step."""
        return (self.steps - 1 - step) * self.code.step_bits


def lane_plan(code: ConvolutionalCode, tile: int, inputs: int, lanes: int) -> LanePlan:
    """Fill vectors of ``lanes`` as far as the sequences and the number of inputs allow."""
    groups = LanePlan(code, tile, lanes, 1).groups
    if groups >= lanes:
        return LanePlan(code, tile, lanes, 1)
    rows = min(lanes // groups, inputs & -inputs)
    return LanePlan(code, tile, groups * rows, rows)
