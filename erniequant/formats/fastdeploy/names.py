"""Keys that FastDeploy's loader asks for, and the tensors of the original that they are made from.

A checkpoint consists of *matrices* (packed weights of a product with their scales: several keys)
and *plain* tensors (one key). Names come from FastDeploy's models/ernie4_5_moe.py and
layers/linear.py; docs/fastdeploy.md has the table. The loader of quantised models ("v0") takes a
key only under its exact name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from erniequant.formats.fastdeploy.packers import WINT4, WINT8
from erniequant.formats.fastdeploy.sizes import WINT2_INPUTS, FastDeployModel
from erniequant.models import ernie45_moe
from erniequant.packing.schema import TensorInfo

Format = Literal["wint8", "wint4", "wint2"]
Cut = Literal["outputs", "inputs"]

PROJECTIONS = ("up_gate_proj", "down_proj")
WINT2_SUFFIXES = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
BIAS = f"moe_statics.{ernie45_moe.BIAS}"


@dataclass(frozen=True)
class Matrix:
    """Weights of one product, ``[outputs, inputs]`` in the orientation of ``nn.Linear``.

    Attributes:
        prefix: prefix of its keys, without the dot.
        format: its coding.
        sources: names of the original's tensors, which follow one another along the outputs.
        outputs: number of outputs of each source.
        cut: the dimension that tensor parallelism divides. Each source is cut by itself: a rank's
            outputs are its part of the first source, then its part of the second.
        expert: layer, expert and one of `PROJECTIONS` for a matrix of a routed expert.
    """

    prefix: str
    format: Format
    sources: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    cut: Cut
    expert: tuple[int, int, str] | None = None

    def rank_shape(self, ranks: int) -> tuple[int, int]:
        """Outputs and inputs of the part that one of ``ranks`` holds."""
        outputs = sum(self.outputs)
        if self.cut == "outputs":
            return outputs // ranks, self.inputs
        return outputs, self.inputs // ranks

    def key_names(self) -> tuple[str, ...]:
        """Names of its keys, the same for every rank."""
        return tuple(f"{self.prefix}.{suffix}" for suffix in self.keys(1))

    def keys(self, ranks: int) -> dict[str, TensorInfo]:
        """Shape and dtype of the keys of one rank, by suffix."""
        outputs, inputs = self.rank_shape(ranks)
        if self.format == "wint2":
            return {
                "quant_weight": ((inputs // 4, outputs), torch.uint8),
                "weight_scale": ((inputs // WINT2_INPUTS, outputs), torch.uint8),
                "super_scales": ((outputs,), torch.bfloat16),
                "code_scale": ((outputs,), torch.float32),
                "code_zp": ((outputs,), torch.float32),
            }
        packing = WINT8 if self.format == "wint8" else WINT4
        return {
            "quant_weight": (packing.packed_shape(inputs, outputs), torch.int8),
            "weight_scale": ((outputs,), torch.bfloat16),
        }


@dataclass(frozen=True)
class Plain:
    """A tensor that is not quantised.

    Attributes:
        key: its name.
        source: name of the original's tensor.
        shape: shape of that tensor.
        dtype: type in which it is written; the loader converts any other float type to it.
        transposed: true if the key holds the transpose, ``[in, out]``.
        cut: the dimension of the *source* that tensor parallelism divides; None: each rank has all.
        optional: true if the original may lack it, which means zeros.
    """

    key: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    cut: int | None = None
    optional: bool = False

    def key_names(self) -> tuple[str, ...]:
        """Its one key."""
        return (self.key,)

    def rank_shape(self, ranks: int) -> tuple[int, ...]:
        """Shape of the key of one rank."""
        sizes = [n // ranks if i == self.cut else n for i, n in enumerate(self.shape)]
        return tuple(reversed(sizes) if self.transposed else sizes)


Part = Matrix | Plain


def parts_of(model: FastDeployModel) -> Iterator[Part]:
    """Everything in a checkpoint of a model: embedding, layers in order, norm, head."""
    embedding = (model.vocabulary, model.hidden)
    yield _plain("embed_tokens.weight", embedding, cut=0)
    for layer in range(model.layers):
        yield from _layer(model, layer)
    yield _plain("norm.weight", (model.hidden,))
    if not model.tied:
        yield Plain("lm_head.weight", "lm_head.weight", embedding, torch.bfloat16, True, cut=0)


def rank_keys(model: FastDeployModel) -> dict[str, TensorInfo]:
    """Shape and dtype of every key of one rank, by name; all ranks have the same."""
    keys: dict[str, TensorInfo] = {}
    for part in parts_of(model):
        if isinstance(part, Plain):
            keys[part.key] = (part.rank_shape(model.tensor_parallel), part.dtype)
            continue
        for suffix, info in part.keys(model.tensor_parallel).items():
            keys[f"{part.prefix}.{suffix}"] = info
    return keys


def _layer(model: FastDeployModel, layer: int) -> Iterator[Part]:
    name, hidden = f"layers.{layer}", model.hidden
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    yield _plain(f"{name}.input_layernorm.weight", (hidden,))
    yield _plain(f"{name}.post_attention_layernorm.weight", (hidden,))
    attention = f"{name}.self_attn"
    yield _matrix(f"{attention}.qkv_proj", ("q_proj", "k_proj", "v_proj"),
                  (queries, keys, keys), hidden)  # fmt: skip
    yield _matrix(f"{attention}.o_proj", ("o_proj",), (hidden,), queries, "inputs")
    if layer < model.first_moe:
        yield from _mlp(f"{name}.mlp", hidden, model.dense_inner)
        return
    router = f"{name}.mlp.gate.weight"
    yield _plain(router, (model.experts, hidden), dtype=torch.float32, transposed=True)
    yield _plain(f"{name}.mlp.{BIAS}", (1, model.experts), dtype=torch.float32, optional=True)
    if model.shared_inner:
        yield from _mlp(f"{name}.mlp.shared_experts", hidden, model.shared_inner)
    for expert in range(model.experts):
        yield from _mlp(f"{name}.mlp.experts.{expert}", hidden, model.inner,
                        "wint4" if model.expert_format(layer) == "wint4" else "wint2",
                        (layer, expert))  # fmt: skip


def _mlp(
    name: str,
    hidden: int,
    inner: int,
    format: Format = "wint8",
    expert: tuple[int, int] | None = None,
) -> Iterator[Matrix]:
    up_gate, down = ((*expert, p) if expert else None for p in PROJECTIONS)
    yield _matrix(f"{name}.up_gate_proj", ("gate_proj", "up_proj"), (inner, inner), hidden,
                  "outputs", format, up_gate)  # fmt: skip
    yield _matrix(f"{name}.down_proj", ("down_proj",), (hidden,), inner, "inputs", format, down)


def _matrix(
    name: str,
    sources: tuple[str, ...],
    outputs: tuple[int, ...],
    inputs: int,
    cut: Cut = "outputs",
    format: Format = "wint8",
    expert: tuple[int, int, str] | None = None,
) -> Matrix:
    module = name.rpartition(".")[0]
    names = tuple(f"model.{module}.{source}.weight" for source in sources)
    return Matrix(f"ernie.{name}", format, names, outputs, inputs, cut, expert)


def _plain(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    transposed: bool = False,
    cut: int | None = None,
    optional: bool = False,
) -> Plain:
    return Plain(f"ernie.{name}", f"model.{name}", shape, dtype, transposed, cut, optional)
