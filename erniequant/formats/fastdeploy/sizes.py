"""The sizes of a model as FastDeploy sees it, and whether it can be served so.

FastDeploy builds its ERNIE 4.5 from fewer settings than transformers has, and its products take
only some sizes: a model that does not fit is refused here, before a tensor is read.
"""

from dataclasses import dataclass
from typing import Any

from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.packers import N_MULTIPLE, TILE_ROWS
from erniequant.models.architecture import Architecture
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.models.registry import architecture_of

WINT2_INPUTS = 128
"""Inputs of a WINT2 product come in multiples of it: a byte of ``weight_scale`` covers this
many."""

VOCABULARY_MULTIPLE = 64
"""FastDeploy pads the vocabulary to it, and its pre-quantised loader then wants the padding."""

NO_WINT4 = -1
"""Last wint4 layer of a model without any."""


@dataclass(frozen=True)
class FastDeployModel:
    """Sizes of a text MoE, undivided, and the coding of its experts.

    ``inner``, ``shared_inner`` and ``dense_inner`` are the inner sizes of a routed expert, of all
    shared experts of a layer together (0: none), and of the MLP of layers below ``first_moe``.
    Experts of layers up to ``w4_end_layer`` are wint4, of later ones WINT2. The checkpoint is cut
    for ``tensor_parallel`` ranks.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    inner: int
    shared_inner: int
    dense_inner: int
    first_moe: int
    vocabulary: int
    tied: bool
    w4_end_layer: int = NO_WINT4
    tensor_parallel: int = 1

    @property
    def moe_layers(self) -> range:
        """Layers with experts."""
        return range(self.first_moe, self.layers)

    def expert_format(self, layer: int) -> str:
        """The coding of a layer's experts: "wint4" or "wint2"."""
        return "wint4" if layer <= self.w4_end_layer else "wint2"


def text_moe(config: dict[str, Any]) -> Ernie45Moe:
    """The architecture of an original that FastDeploy can serve with WINT2.

    Raises:
        ErnieQuantError: it is not a text MoE. FastDeploy has no WINT2 for vision-language models.
    """
    return text_moe_of(architecture_of(config))


def text_moe_of(model: Architecture, hint: str = "") -> Ernie45Moe:
    """The text mixture that FastDeploy can serve; ``hint`` ends the line that refuses another.

    Raises:
        ErnieQuantError: any other model, also of a family with the same experts: FastDeploy finds
            its own code by the name of the architecture.
    """
    if type(model) is not Ernie45Moe:
        raise ErnieQuantError(
            f"FastDeploy serves WINT2 of text mixtures of experts only, not of an "
            f"{model.description}{hint}"
        )
    return model


def fastdeploy_model(
    architecture: Ernie45Moe, w4_end_layer: int = NO_WINT4, tensor_parallel: int = 1
) -> FastDeployModel:
    """Sizes of a model for FastDeploy.

    Args:
        architecture: the architecture that its config.json describes.
        w4_end_layer: last layer whose experts are wint4; anything below the first MoE layer: none.
        tensor_parallel: number of ranks that the checkpoint is cut for.

    Raises:
        ErnieQuantError: FastDeploy would build another model, or a size has no layout.
    """
    config, sizes = architecture.config, architecture.sizes
    _require_same_model(config, sizes.moe_layers)
    group = sizes.groups[0]
    model = FastDeployModel(
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or sizes.hidden // config.num_attention_heads,
        experts=group.experts,
        inner=group.inner,
        shared_inner=config.moe_num_shared_experts * group.inner,
        dense_inner=config.intermediate_size,
        first_moe=sizes.moe_layers[0],
        vocabulary=sizes.vocabulary,
        tied=bool(config.tie_word_embeddings),
        w4_end_layer=w4_end_layer,
        tensor_parallel=tensor_parallel,
    )
    _require_layouts(model)
    return model


def _require_same_model(config: Any, moe_layers: tuple[int, ...]) -> None:
    if moe_layers != tuple(range(moe_layers[0], config.num_hidden_layers)):
        raise ErnieQuantError(
            f"config.json puts experts into layers {_shortened(moe_layers)}; FastDeploy puts them "
            f"into all layers from moe_layer_start_index on, up to {config.num_hidden_layers - 1}"
        )
    if config.use_bias:
        raise ErnieQuantError("config.json has use_bias; FastDeploy's ERNIE 4.5 has no biases")
    if config.hidden_act != "silu":
        raise ErnieQuantError(
            f"config.json has hidden_act {config.hidden_act!r}; FastDeploy's experts use silu"
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ErnieQuantError(
            f"config.json has rope_type {rope['rope_type']!r}; FastDeploy's ERNIE 4.5 knows the "
            "default alone"
        )


def _shortened(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}..{layers[-1]} ({len(layers)} of them)" if len(layers) > 4 else str(layers)


def _require_layouts(model: FastDeployModel) -> None:
    ranks = model.tensor_parallel
    if ranks < 1:
        raise ErnieQuantError(f"tensor parallel needs at least 1 rank, not {ranks}")
    attention = model.heads * model.head_dim
    for size, what, multiple in (
        (model.hidden, "hidden_size", WINT2_INPUTS),
        (model.vocabulary, "vocab_size", VOCABULARY_MULTIPLE),
    ):
        if size % multiple:
            raise ErnieQuantError(
                f"config.json has {what} {size}; FastDeploy needs a multiple of {multiple}"
            )
    per_rank = [
        (model.inner, "moe_intermediate_size", WINT2_INPUTS),
        (model.heads, "num_attention_heads", 1),
        (model.kv_heads, "num_key_value_heads", 1),
        (attention, "the size of all attention heads", TILE_ROWS),
        (attention + 2 * model.kv_heads * model.head_dim, "the size of queries, keys and values",
         N_MULTIPLE),
        (model.vocabulary, "vocab_size", 1),
    ]  # fmt: skip
    if model.shared_inner:
        per_rank.append((model.shared_inner, "the inner size of shared experts", TILE_ROWS))
    if model.first_moe:
        per_rank.append((model.dense_inner, "intermediate_size", TILE_ROWS))
    for size, what, multiple in per_rank:
        if size % (ranks * multiple):
            parts = f"; cut for {ranks} ranks that has to be a multiple of {ranks * multiple}"
            alone = f"; FastDeploy needs a multiple of {multiple}"
            raise ErnieQuantError(f"{what} is {size}{parts if ranks > 1 else alone}")
