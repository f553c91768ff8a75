"""Input-side incoherence: random signs, then a normalised Hadamard transform over blocks of input
channels.

Rotating both the weights and the inputs of a matrix leaves the product unchanged and makes the
weights look Gaussian, which is what the codes are made for. The block is the largest power of two
up to 128 that divides the input size; below 16 only the signs are applied (block 1).
"""

import torch

MAX_BLOCK = 128
MIN_BLOCK = 16
_SIGN_BITS = 32


def block_size(inputs: int) -> int:
    """Largest power of two up to 128 that divides ``inputs``, or 1 when that is below 16."""
    block = min(inputs & -inputs, MAX_BLOCK)
    return block if block >= MIN_BLOCK else 1


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Orthonormal Hadamard transform (its own inverse) of consecutive blocks of the last
    dimension."""
    y = x.unflatten(-1, (-1, block))
    half = 1
    while half < block:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2)


def rotate(x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """Rotate inputs (or the rows of a weight) ``[..., K]`` by signs ``[K]`` of +-1, then block
    Hadamard."""
    return hadamard(x * signs, block)


def unrotate(x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """Inverse of `rotate`: ``y = rotate(x) @ W.T`` equals ``y = x @ unrotate(W).T``."""
    return hadamard(x, block) * signs


def random_signs(inputs: int, generator: torch.Generator) -> torch.Tensor:
    """Signs drawn uniformly from {-1, +1}: float32 ``[inputs]``."""
    return torch.randint(0, 2, (inputs,), generator=generator).float() * 2 - 1


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """Signs ``[K]`` to int32 ``[ceil(K / 32)]``: channel ``c`` is bit ``c % 32`` of word ``c //
    32``, set for -1."""
    n_words = -(-signs.numel() // _SIGN_BITS)
    bits = torch.zeros(n_words * _SIGN_BITS, dtype=torch.int64, device=signs.device)
    bits[: signs.numel()] = signs < 0
    weights = torch.arange(_SIGN_BITS, device=signs.device)
    words = (bits.view(n_words, _SIGN_BITS) << weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_signs(words: torch.Tensor, inputs: int) -> torch.Tensor:
    """Inverse of `pack_signs`: int32 ``[..., ceil(K / 32)]`` to float32 +-1 ``[..., K]``."""
    shifts = torch.arange(_SIGN_BITS, device=words.device, dtype=torch.int32)
    bits = (words[..., None] >> shifts) & 1
    return 1.0 - 2.0 * bits.flatten(-2)[..., :inputs].float()
