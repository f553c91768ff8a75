"""Baidu's CCQ codes (arXiv 2507.07145) as members of the family: linear labels, no hash, and words
instead of tail-biting sequences.

What a checkpoint stores is `erniequant.ccq`'s concern: WINT2 keeps a word of 15 bits as one byte
from which an affine map per output channel makes it; WINT2.5 and WINT2.75 keep words as they are.
"""

from erniequant.codes.labels import Label, minus_eight, minus_four, minus_thirty_two
from erniequant.codes.spec import ConvolutionalCode

# Of the bits named here each step shifts in, WINT2 stores two thirds: the map decides the rest.
WINT2 = ConvolutionalCode("wint2", 3, 6, 1, Label("minus_thirty_two", 1, minus_thirty_two), (4,))
"""Four weights in a word of 15 bits: registers at bits 9, 6, 3 and 0."""

WINT25 = ConvolutionalCode("wint2.5", 2, 3, 1, Label("minus_four", 1, minus_four), (3, 4))
"""Seven weights in a word of 16 bits: registers at bits 13, 11, 9 and 6, 4, 2, 0."""

WINT275 = ConvolutionalCode("wint2.75", 2, 4, 1, Label("minus_eight", 1, minus_eight), (3,))
"""Three weights in a word of 8 bits: registers at bits 4, 2 and 0."""
