"""The Viterbi search on a card: its words against those of the CPU, and its rate."""

import argparse
import time

import numpy as np
import torch

from benchmarks.gpu.records import record
from benchmarks.kernels.encoder import CODES, TILES
from erniequant.codes import ConvolutionalCode, get_code
from erniequant.codes.viterbi import encoder
from erniequant_kernels.machine_code_cases import EXPERTS, TILE
from erniequant_kernels.viterbi import search_rows

CHECKED_ROWS, TIMED_ROWS = 4, 16
RATE_WANTED = 100e6
"""Weights a second at a register of 12 bits, for all experts of a layer together."""


def search(options: argparse.Namespace) -> bool:
    """Whether a card finds the CPU's words, and how many weights a second it searches: tiles of
    gate and up of the 21B, of one expert and of all."""
    right = True
    device = torch.device(options.device)
    for code in (get_code(*key) for key in CODES):
        same = words_equal(code, device)
        rates = {matrices: rate(code, matrices, device) for matrices in (1, EXPERTS)}
        name = f"{code.name} L{code.register_length}"
        record(search=name, equals_cpu=same, weights_per_second=rates)
        text = ", ".join(f"{n} experts {found / 1e6:.0f} M weights/s" for n, found in rates.items())
        print(f"{name}: words of the CPU: {same}; {text}", flush=True)
        if code.register_length == 12 and rates[EXPERTS] < RATE_WANTED:
            print(f"{name}: below {RATE_WANTED / 1e6:.0f} M weights/s", flush=True)
        right = right and same
    return right


def problem(
    matrices: int, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `search_rows`: Gaussian rows with feedback."""
    generator = torch.Generator().manual_seed(rows)
    outputs = TILES * TILE
    aims = torch.randn(matrices, rows, outputs, generator=generator)
    feedback = 0.1 * torch.randn(matrices, rows, rows, generator=generator)
    scale = torch.ones(matrices, outputs)
    weights = torch.randn(matrices, TILES, TILE, generator=generator).exp()
    made = (aims, feedback.tril(-1), scale, weights, aims.clone())
    return tuple(tensor.to(device) for tensor in made)  # type: ignore[return-value]


def words_equal(code: ConvolutionalCode, device: torch.device) -> bool:
    """Whether the words of a matrix are those that the CPU finds."""
    given = problem(1, CHECKED_ROWS, device)
    expected, _ = encoder(code).encode_rows(*(tensor[0].cpu().numpy().copy() for tensor in given))
    words, _ = search_rows(*given, code)
    return bool(np.array_equal(words[0].cpu().numpy().view(np.uint32), expected))


def rate(code: ConvolutionalCode, matrices: int, device: torch.device) -> float:
    """Weights a second, all tensors on the card; of the second call, which compiles nothing."""
    for _ in range(2):
        given = problem(matrices, TIMED_ROWS, device)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        search_rows(*given, code)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    return given[0].numel() / seconds
