"""Compare configurations of the products by their predicted time; needs no GPU.

``python -m benchmarks.kernels.search --card H100 --shape 21b --tokens 16 --code cc2`` counts all
candidates in parallel and prints the best of each projection and of both together: a row tile
serves both. Predictions are no measurements; `erniequant bench tune` measures on a card.
"""

import argparse
import os
from collections.abc import Iterator

from benchmarks.kernels.cards import CARDS
from benchmarks.kernels.counts import Wanted, counted, prepare_counts
from benchmarks.kernels.prediction import KernelTime, bf16, predict, product
from erniequant.codes import CODE_NAMES, ConvolutionalCode, get_code, register_length
from erniequant.codes.registry import CODES
from erniequant.errors import ErnieQuantError
from erniequant_kernels.bench.problem import SHAPES, Shape
from erniequant_kernels.fused_gemm import FusedGemmConfig
from erniequant_kernels.packed_gemm import PackedGemmConfig
from erniequant_kernels.tuning import MAX_SPLITS, GemmConfig


def packed_candidates() -> Iterator[PackedGemmConfig]:
    """Packed products with one split."""
    for block_m in (8, 16, 32):
        for block_k in (16, 32, 64):
            for warps in (1, 2, 4):
                for stages in (2, 3):
                    yield PackedGemmConfig(block_m, block_k, 1, warps, stages)


def fused_candidates() -> Iterator[FusedGemmConfig]:
    """Fused products."""
    for block_m in (16, 32, 64, 128):
        for block_n in (64, 128, 256):
            for block_k in (32, 64):
                for warps in (4, 8):
                    for stages in (2, 3):
                        yield FusedGemmConfig(block_m, block_n, block_k, warps, stages)


def _split(config: GemmConfig, inputs: int) -> Iterator[GemmConfig]:
    """The configuration with every number of splits that divides its turns evenly."""
    if inputs % config.block_k:
        return
    if not isinstance(config, PackedGemmConfig):
        yield config
        return
    turns = inputs // config.block_k
    for splits in range(1, min(MAX_SPLITS, turns) + 1):
        if turns % splits == 0:
            yield PackedGemmConfig(
                config.block_m, config.block_k, splits, config.warps, config.stages
            )


def best(
    card_name: str, shape: Shape, tokens: int, code: ConvolutionalCode,
    candidates: list[GemmConfig], processes: int | None = None,
) -> dict[int, list[list[tuple[KernelTime, GemmConfig]]]]:  # fmt: skip
    """For each row tile, the candidates for gate and up and for down, fastest first.

    Those that spill, do not compile or need more shared memory than the card has are left out.
    """
    card = next(card for card in CARDS if card_name.lower() in card.name.lower())
    prepare_counts([Wanted(card.arch, code, c) for c in candidates], processes)
    usable = []
    for candidate in candidates:
        try:
            cost = counted(Wanted(card.arch, code, candidate)).cost
        except ErnieQuantError:
            continue
        if not cost.spill_bytes and cost.shared_bytes + 1024 <= card.shared_bytes:
            usable.append(candidate)
    found: dict[int, list[list[tuple[KernelTime, GemmConfig]]]] = {}
    for block_m in sorted({candidate.block_m for candidate in usable}):
        found[block_m] = []
        for down in (False, True):
            inputs = shape.inner if down else shape.hidden
            times = [
                (product(card, shape, tokens, code, config, down=down), config)
                for candidate in usable
                if candidate.block_m == block_m
                for config in _split(candidate, inputs)
            ]
            found[block_m].append(sorted(times, key=lambda t: t[0].seconds))
    return found


def main() -> None:
    """Print the best configurations."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--card", default="H100", help="part of its name")
    parser.add_argument("--shape", default="21b", choices=SHAPES)
    parser.add_argument("--tokens", default="1,16,64", help="comma-separated")
    parser.add_argument("--code", default="cc2", choices=CODE_NAMES)
    parser.add_argument("--length", type=int, help="of the register; that of `standard` by default")
    parser.add_argument("--kernel", default="packed", choices=("packed", "fused"))
    parser.add_argument("--top", type=int, default=4)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    bits = CODES[arguments.code].bits
    code = get_code(arguments.code, arguments.length or register_length(bits, "standard"))
    card = next(card for card in CARDS if arguments.card.lower() in card.name.lower())
    candidates: list[GemmConfig] = [
        *(packed_candidates() if arguments.kernel == "packed" else fused_candidates())
    ]
    for tokens in map(int, arguments.tokens.split(",")):
        found = best(
            card.name, shape, tokens, code, candidates, os.cpu_count()
        )  # fmt: skip
        plain = bf16(card, shape, tokens).seconds
        print(f"{card.name}, {arguments.shape}, {tokens} tokens, {code.name}", flush=True)
        for block_m, (first, second) in found.items():
            if not first or not second:
                continue
            layer = predict(card, shape, tokens, code, configs=(first[0][1], second[0][1]))
            print(
                f"  row tiles of {block_m}: {1e6 * layer.seconds:.1f} us a layer,"
                f" {plain / layer.seconds:.2f} x bf16"
            )
            for time, config in (*first[: arguments.top], *second[: arguments.top]):
                parts = ", ".join(f"{name} {1e6 * s:.1f}" for name, s in time.parts.items())
                print(
                    f"    {time.name:11} {1e6 * time.seconds:7.1f} us, efficiency "
                    f"{time.efficiency:.2f}, {time.bound} ({parts})  {config}"
                )


if __name__ == "__main__":
    main()
