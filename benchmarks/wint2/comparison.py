"""WINT2 against GPTQ and our own code on matrices of many kinds; the tables of docs/ccq.md.

Every function gives the lines of one table.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.wint2.study import VARIANTS, measure
from erniequant.ccq import encode_matrix
from erniequant.codes import get_code
from erniequant.encoding.matrix import QuantizedMatrix, Rotation, quantize_matrix
from erniequant.formats.fastdeploy.ccq.books import BOOKS, UNIFORM_BOOK
from erniequant.formats.fastdeploy.ccq.encode import Settings
from erniequant.packing.rotation import block_size, random_signs
from testing.gptq import gptq, relative_error
from testing.massive_channels import massive_layer
from testing.tiny_matrices import expert_matrices

PUBLISHED = Settings(books=(UNIFORM_BOOK,), feedback=False, sweeps=0)


def gaussian_rows() -> Iterator[str]:
    """Error and speed of each variant on N(0, 1)."""
    yield "| code books | K = 1024 | K = 2560 | weights/s, K = 2560 |"
    yield "|---|---|---|---|"
    for name, settings in VARIANTS.items():
        small, large = measure(settings, 1024, 256), measure(settings, 2560, 256)
        cells = (f"{x.mse:.4f} ± {x.half_width:.4f}" for x in (small, large))
        yield f"| {name} | {' | '.join(cells)} | {large.rate:,.0f} |"


def native(weight: torch.Tensor, hessian: torch.Tensor) -> QuantizedMatrix:
    """cc2 at the standard effort."""
    outputs, inputs = weight.shape
    signs = random_signs(inputs, torch.Generator().manual_seed(1))
    rotation = Rotation(signs, block_size(inputs))
    tile = min(outputs & -outputs, 256)
    code = get_code("cc2", 12)
    return quantize_matrix(weight, hessian.clone(), torch.ones(outputs), rotation, code, tile)


def native_error(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative error of cc2 at the standard effort."""
    return native(weight, hessian).error


def wint2_error(settings: Settings) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Relative error of the encoder with some settings."""
    return lambda weight, hessian: encode_matrix(weight, hessian, settings=settings).error


def gptq_error(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative error of the baseline."""
    return relative_error(weight, gptq(weight, hessian), hessian)


METHODS = {
    "GPTQ, 2 bits, group 64": ("2.28", gptq_error),
    "WINT2, published map, no feedback": ("2 + 4/64 + 80/K", wint2_error(PUBLISHED)),
    "WINT2, our encoder": ("2 + 4/64 + 80/K", wint2_error(Settings())),
    "cc2, L = 12": ("2 + 17/K", native_error),
}
"""Methods of the comparison: bits per weight for K inputs, relative error of a matrix."""


def tiny_rows() -> Iterator[str]:
    """Mean and range over the expert matrices of the embedded model."""
    layers = expert_matrices()
    yield "| method | bits/weight | gate and up, mean | range | down, mean | range |"
    yield "|---|---|---|---|---|---|"
    for name, (bits, error) in METHODS.items():
        cells = []
        for part in ("gate_up", "down"):
            errors = [error(x.weight, x.hessian) for x in layers if x.name.endswith(part)]
            mean = sum(errors) / len(errors)
            cells.append(f"{mean:.4f} | {min(errors):.4f} – {max(errors):.4f}")
        yield f"| {name} | {bits} | {' | '.join(cells)} |"


def held_out_rows() -> Iterator[str]:
    """Error on text other than that of the Hessians; four experts of each layer."""
    encoders: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "GPTQ": gptq,
        "WINT2": lambda w, h: encode_matrix(w, h).effective,
        "WINT2 without descent": lambda w, h: (
            encode_matrix(w, h, settings=Settings(sweeps=0)).effective
        ),
        "cc2": lambda w, h: native(w, h).effective,
    }
    truth = {layer.name: layer.hessian for layer in expert_matrices(32768, held_out=True)}
    yield f"| tokens | per expert and input | {' | '.join(encoders)} |"
    yield "|---" * (2 + len(encoders)) + "|"
    for tokens in (1024, 4096, 16384, 65536):
        layers = [
            layer
            for layer in expert_matrices(tokens)
            if layer.name.split(".")[1] in ("1", "3", "9", "12")
        ]
        cells = []
        for encode in encoders.values():
            errors = [
                relative_error(x.weight, encode(x.weight, x.hessian), truth[x.name]) for x in layers
            ]
            cells.append(f"{sum(errors) / len(errors):.4f}")
        yield f"| {tokens} | {tokens * 4 // 16 // 256} | {' | '.join(cells)} |"


CASES = ((0.5, 1, 1.0), (0.5, 1, 0.05), (0.9, 2, 1.0), (0.9, 2, 8.0), (0.999, 1, 1.0))


def massive_rows() -> Iterator[str]:
    """Rows for matrices with massive channels, by share of the trace, number, and size of their
    weights."""
    yield "| share | channels | size of weights | tokens | GPTQ | WINT2 | ratio | cc2 |"
    yield "|---|---|---|---|---|---|---|---|"
    for tokens in (2048, 300):
        for share, channels, size in CASES:
            layer = massive_layer(512, tokens, share, channels, size)
            theirs, ours = gptq_error(*layer), encode_matrix(*layer).error
            yield (
                f"| {share} | {channels} | {size:g} | {tokens} | {theirs:.5f} | {ours:.5f} | "
                f"{ours / theirs:.3f} | {native_error(*layer):.5f} |"
            )


def part_rows() -> Iterator[str]:
    """Rows for the encoder without one part after another."""
    full = Settings()
    settings = {
        "the encoder": full,
        "one round of coordinate descent": replace(full, sweeps=1),
        "no coordinate descent": replace(full, sweeps=0),
        "12 code books": replace(full, books=BOOKS[:12]),
        "one code book": replace(full, books=BOOKS[:1]),
        "the same without coordinate descent": replace(full, books=BOOKS[:1], sweeps=0),
        "and only the guessed nibble": replace(full, books=BOOKS[:1], sweeps=0, tries=1),
        "and no feedback": replace(full, books=BOOKS[:1], sweeps=0, tries=1, feedback=False),
        "and the published map": replace(PUBLISHED, tries=1),
    }
    generator = torch.Generator().manual_seed(2)
    mix = torch.eye(1024) + torch.randn(1024, 1024, generator=generator) / 32
    x = torch.randn(4096, 1024, generator=generator) @ mix
    weight = torch.randn(128, 1024, generator=generator)
    tiny = [layer for layer in expert_matrices() if ".3." in layer.name]
    yield "| encoder | correlated Gaussian inputs | tiny model |"
    yield "|---|---|---|"
    encoders = {name: wint2_error(chosen) for name, chosen in settings.items()}
    for name, error_of in (encoders | {"cc2, L = 12": native_error}).items():
        of_tiny = [error_of(layer.weight, layer.hessian) for layer in tiny]
        error = error_of(weight, x.T @ x / 4096)
        yield f"| {name} | {error:.4f} | {sum(of_tiny) / len(of_tiny):.4f} |"
