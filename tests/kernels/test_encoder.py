"""Matrices whose codes are searched by the GPU's kernel: those that the CPU finds."""

import pickle

import numpy as np
import pytest
import torch

from erniequant.codes import get_code
from erniequant.codes.viterbi import encoder
from erniequant.encoding import ldlq
from erniequant.encoding.ldlq import OutputFactor, encode_matrix
from erniequant.encoding.matrix import Rotation, TrellisQuantizer
from erniequant.formats.native.search import encoder_of
from erniequant.packing.schema import MatrixSpec
from erniequant_kernels import viterbi
from erniequant_kernels.encoder import gpu_encoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODE, TILE, ROWS, TILES = get_code("cc2s", 8), 32, 3, 2


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_matrix_is_encoded_as_on_the_cpu(two_sided, monkeypatch):
    # Three rows in blocks of two: the last block has one row.
    monkeypatch.setattr(ldlq, "BLOCK", 2)
    monkeypatch.setattr(viterbi, "LANE_LABELS", 8)
    generator = torch.Generator().manual_seed(5)
    outputs = TILES * TILE
    weight = torch.randn(ROWS, outputs, generator=generator)
    feedback = (0.3 * torch.randn(ROWS, ROWS, generator=generator)).tril(-1) + torch.eye(ROWS)
    scale = (0.3 * torch.randn(outputs, generator=generator)).exp()
    between = torch.zeros(outputs, outputs)
    between[TILE:, :TILE] = 0.05 * torch.randn(TILE, TILE, generator=generator)
    metric = OutputFactor(
        torch.randn(outputs, generator=generator).exp(), between if two_sided else None
    )
    found, expected = (
        encode_matrix(weight, feedback, scale, metric, search, TILE)
        for search in (gpu_encoder(CODE, DEVICE), encoder(CODE))
    )
    assert torch.equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.words, expected.words)


def test_a_quantizer_with_this_encoder_can_be_pickled():
    spec = MatrixSpec("cc2", 10, 32, 32)
    made = TrellisQuantizer(spec, Rotation(torch.ones(32), 32), encoder_of("cuda"))
    assert pickle.loads(pickle.dumps(made)).encoder is gpu_encoder
