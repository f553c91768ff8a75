"""The problem to measure: a layer of experts of a published model, a batch of tokens, a routing."""

import math
from dataclasses import dataclass
from functools import partial

import torch

from erniequant.codes import register_length
from erniequant.codes.ccq.decode import decode_wint2
from erniequant.packing.decoding import decode_weight, encode_scale
from erniequant.packing.products import WeightOf
from erniequant.packing.rotation import block_size, pack_signs, random_signs
from erniequant.packing.schema import MatrixSpec, tile_size
from erniequant_kernels.matrices import PackedMatrices, Wint2Matrices

BFLOAT16_BITS = 16
SCALE = 2**-5

WINT2_INPUTS = 128
"""Inputs of a WINT2 matrix come in multiples of it."""


@dataclass(frozen=True)
class Shape:
    """The experts of one layer: hidden size, inner size of an expert, experts, experts a token."""

    hidden: int
    inner: int
    experts: int
    top_k: int

    @property
    def weights_per_expert(self) -> int:
        """Weights of gate, up and down of one expert."""
        return 3 * self.hidden * self.inner


SHAPES = {
    "21b": Shape(2560, 1536, 64, 6),
    "vl": Shape(2560, 512, 64, 6),  # vision experts; the text experts are as in 21b
    "300b": Shape(8192, 3584, 64, 8),
    "tiny": Shape(128, 64, 4, 2),  # for Triton's interpreter
}


@dataclass(frozen=True)
class Batch:
    """Inputs of the experts: ``x`` bf16 ``[T, H]``, indices int64 and weights bf16 ``[T, k]``."""

    x: torch.Tensor
    expert_index: torch.Tensor
    routing: torch.Tensor

    @property
    def active_experts(self) -> int:
        """Experts with at least one token, whose weights have to be read."""
        return int(torch.unique(self.expert_index).numel())


@dataclass(frozen=True)
class DenseExperts:
    """Decoded weights of a layer, bf16: ``gate_up [E, 2 I, H]`` and ``down [E, H, I]``."""

    gate_up: torch.Tensor
    down: torch.Tensor

    def weight(self, projection: str, expert: int) -> torch.Tensor:
        """One matrix in float32."""
        return {"gate_up_proj": self.gate_up, "down_proj": self.down}[projection][expert].float()


def make_batch(shape: Shape, tokens: int, device: torch.device) -> Batch:
    """Random tokens; each chooses its experts uniformly, which touches the most weights."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, shape.experts, generator=generator)
    routing, index = scores.topk(shape.top_k, dim=-1)
    routing = routing / routing.sum(-1, keepdim=True)
    x = torch.randn(tokens, shape.hidden, generator=generator)
    return Batch(x.to(device).bfloat16(), index.to(device), routing.to(device).bfloat16())


def random_matrices(
    shape: Shape, bits: int, experts: int, device: torch.device
) -> tuple[PackedMatrices, PackedMatrices]:
    """Gate and up, and down, of random words: any words decode."""

    def matrices(outputs: int, inputs: int) -> PackedMatrices:
        how = _spec(shape, bits, inputs)
        code = how.conv()
        words = inputs * code.words_per_sequence(how.tile)
        packed = torch.randint(
            -(2**31), 2**31, (experts, outputs // how.tile, words), dtype=torch.int32, device=device
        )
        scale = encode_scale(torch.full((experts, outputs, 1), SCALE, device=device))
        signs = pack_signs(random_signs(inputs, torch.Generator().manual_seed(inputs))).to(device)
        return PackedMatrices(packed, scale, signs, code, how.tile, how.rotation_block)

    return matrices(2 * shape.inner, shape.hidden), matrices(shape.hidden, shape.inner)


def decoded(shape: Shape, matrices: PackedMatrices, expert: int) -> torch.Tensor:
    """Weights of one expert, float32 ``[N, K]``."""
    how = _spec(shape, matrices.code.bits, matrices.inputs)
    return decode_weight(matrices.packed[expert], matrices.scale[expert], matrices.signs, how)


def fits_wint2(shape: Shape) -> bool:
    """Whether both matrices of an expert can be in WINT2, whose inputs are multiples of 128."""
    return shape.inner % WINT2_INPUTS == 0 == shape.hidden % WINT2_INPUTS


def wint2_expert_bytes(shape: Shape) -> int:
    """Bytes of an expert: codes, local scales, and a super scale and a map for each output."""
    weights = shape.weights_per_expert
    return weights // 4 + weights // 128 + 10 * (2 * shape.inner + shape.hidden)


def random_wint2(
    shape: Shape, experts: int, device: torch.device
) -> tuple[Wint2Matrices, Wint2Matrices]:
    """Gate and up, and down, of random bytes, in the order of inputs that FastDeploy serves."""

    def matrices(outputs: int, inputs: int) -> Wint2Matrices:
        bytes_ = partial(torch.randint, 256, dtype=torch.uint8, device=device)
        normal = partial(torch.randn, experts, outputs, device=device)
        supers = torch.full((experts, outputs), 2.0**-12, dtype=torch.bfloat16, device=device)
        return Wint2Matrices(
            bytes_((experts, inputs // 4, outputs)), bytes_((experts, inputs // 128, outputs)),
            supers, normal() * 16, normal() * 1000, "mma64",
        )  # fmt: skip

    return matrices(2 * shape.inner, shape.hidden), matrices(shape.hidden, shape.inner)


def decoded_wint2(matrices: Wint2Matrices, expert: int) -> torch.Tensor:
    """Weights of one expert, float32 ``[N, K]``."""
    parts = [part[expert] for part in matrices.parts]
    return decode_wint2(*parts, k_order=matrices.k_order).T


def dense_experts(shape: Shape, weight: WeightOf, device: torch.device) -> DenseExperts:
    """All experts of a layer, rounded to bfloat16 one by one."""

    def dense(projection: str, outputs: int, inputs: int) -> torch.Tensor:
        size = (shape.experts, outputs, inputs)
        weights = torch.empty(size, dtype=torch.bfloat16, device=device)
        for expert in range(shape.experts):
            weights[expert] = weight(projection, expert)
        return weights

    return DenseExperts(
        dense("gate_up_proj", 2 * shape.inner, shape.hidden),
        dense("down_proj", shape.hidden, shape.inner),
    )


def _spec(shape: Shape, bits: int, inputs: int) -> MatrixSpec:
    length = register_length(bits, "standard")
    return MatrixSpec(f"cc{bits}", length, _tile(shape), block_size(inputs))


def _tile(shape: Shape) -> int:
    return tile_size(math.gcd(shape.hidden, shape.inner), "sizes of the benchmark")


def bytes_read(shape: Shape, batch: Batch, bits: int, expert_bytes: int | None = None) -> int:
    """Bytes that no method can avoid: active experts' weights and scales, inputs, outputs.

    expert_bytes: of an expert's weights and scales, where ``bits`` does not tell.
    """
    if expert_bytes is None:
        expert_bytes = shape.weights_per_expert * bits // 8
        if bits != BFLOAT16_BITS:
            expert_bytes += 2 * (2 * shape.inner + shape.hidden)
    return batch.active_experts * expert_bytes + 2 * batch.x.nbytes
