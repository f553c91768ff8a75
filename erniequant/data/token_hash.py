"""The hash that says which tokens a figure was made with."""

import hashlib

import torch


def hash_token_ids(token_ids: torch.Tensor) -> str:
    """SHA-256 of the ids as little-endian 32-bit integers, one after the other."""
    return hashlib.sha256(token_ids.numpy().astype("<i4").tobytes()).hexdigest()
