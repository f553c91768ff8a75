"""The family of convolutional codes, as data.

A code of rate ``bits`` turns a bit stream into weights: every step shifts ``step_bits`` new bits
into a register that keeps the last ``register_length`` of them, and a label function of the
register emits ``weights_per_step`` weights. Members of the family: CCQ (arXiv 2507.07145), QTIP
(arXiv 2406.11235). They differ in step, register, label and in how a sequence begins: the native
codes are tail-biting, CCQ's keep every few weights in a word that begins with a full register.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erniequant.codes.labels import Label

WORD_BITS = 32


@dataclass(frozen=True)
class ConvolutionalCode:
    """One code: everything that a reader needs to turn a bit stream into weights.

    Without ``runs``, sequences are tail-biting: the register before the first step holds the last
    bits of the sequence, so ``tile`` weights cost exactly ``tile * bits`` bits and no state is
    stored. With ``runs``, the stream is cut into words; a word holds one run of steps after the
    other, the first run in its highest bits, and each run begins with a full register: a run of
    ``n`` steps takes ``register_length + (n - 1) * step_bits`` bits.
    """

    name: str
    bits: int
    register_length: int
    multiplier: int
    label: Label
    runs: tuple[int, ...] = ()

    @property
    def weights_per_step(self) -> int:
        """Weights that one step emits."""
        return self.label.weights_per_step

    @property
    def step_bits(self) -> int:
        """Bits shifted into the register by one step."""
        return self.bits * self.weights_per_step

    @property
    def states(self) -> int:
        """Number of register values."""
        return 1 << self.register_length

    @property
    def word_bits(self) -> int:
        """Bits of a word that is cut into runs; 0 for a tail-biting code."""
        return sum(self.register_length + (steps - 1) * self.step_bits for steps in self.runs)

    @property
    def window_shifts(self) -> tuple[int, ...]:
        """How far to shift a word to the right for each of its registers, in the order of steps."""
        shifts, below = [], self.word_bits
        for steps in self.runs:
            below -= self.register_length + (steps - 1) * self.step_bits
            shifts += [below + step * self.step_bits for step in reversed(range(steps))]
        return tuple(shifts)

    def words_per_sequence(self, tile: int) -> int:
        """32-bit words that hold one sequence of ``tile`` weights."""
        return tile * self.bits // WORD_BITS

    def table(self) -> NDArray[np.float32]:
        """Labels of every register value: float32 ``[2**register_length, weights_per_step]``."""
        register = np.arange(self.states, dtype=np.uint32)
        return self.label.function(register * np.uint32(self.multiplier))
