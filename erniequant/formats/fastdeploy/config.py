"""config.json as FastDeploy reads it, and our own record in it.

From FastDeploy's fastdeploy/config.py and layers/quantization: it fills attributes that a file
lacks with values of its own (rope_theta 10000, no shared experts, head not tied), so everything
that matters is written out. `docs/fastdeploy.md` says which entry does what.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.recognise import is_fastdeploy_wint2
from erniequant.formats.fastdeploy.sizes import FastDeployModel
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.version import PRODUCER

K_ORDERS = ("plain", "mma64")
DEFAULT_K_ORDER = "mma64"
"""The K order that FastDeploy's kernels read since 23 July 2025 (pull request 2990); see
docs/fastdeploy.md."""

RECORD = "erniequant"
"""Our entry of config.json; FastDeploy keeps entries that it does not know and uses none."""

DEFAULT_W4_END_LAYER = 6
"""FastDeploy's value where config.json has none."""

# FastDeploy takes torch_dtype, or dtype beside a transformers_version above 4.56, as a mark of
# torch's layout, in which it does not know WINT2; rope_parameters it does not read at all.
_DROPPED = ("torch_dtype", "dtype", "transformers_version", "rope_parameters", "rope_scaling",
            "quantization_config", "auto_map", "is_quantized", RECORD)  # fmt: skip


@dataclass(frozen=True)
class FastDeploySettings:
    """The coding of a checkpoint's experts.

    ``w4_end_layer`` is the last layer with wint4 experts. ``k_order``, ``producer`` and
    ``tensor_parallel`` come from our record and are None in files by others.
    """

    w4_end_layer: int
    k_order: str | None = None
    producer: str | None = None
    tensor_parallel: int | None = None


def fastdeploy_config(
    source: Mapping[str, Any], architecture: Ernie45Moe, model: FastDeployModel, k_order: str
) -> dict[str, Any]:
    """config.json of a checkpoint for FastDeploy.

    Args:
        source: config.json of the original; entries that FastDeploy ignores are kept.
        architecture: the architecture that it describes.
        model: the sizes and coding that are written.
        k_order: one of `K_ORDERS`.
    """
    config = architecture.config
    kept = {name: value for name, value in source.items() if name not in _DROPPED}
    stated = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "is_quantized": True,
        "hidden_size": model.hidden,
        "intermediate_size": model.dense_inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocabulary,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": model.tied,
        "use_bias": False,
        "moe_num_experts": model.experts,
        "moe_k": config.moe_k,
        "moe_intermediate_size": model.inner,
        "moe_num_shared_experts": config.moe_num_shared_experts,
        "moe_layer_start_index": model.first_moe,
        "moe_layer_end_index": model.layers - 1,
        "moe_layer_interval": 1,
        # FastDeploy 2.0 looks for the routers' correction bias only if this is set.
        "moe_use_aux_free": True,
    }
    record = {
        "k_order": k_order,
        "producer": PRODUCER,
        "tensor_parallel": model.tensor_parallel,
    }
    return {**kept, **stated, "quantization_config": _quantization(model), RECORD: record}


def _quantization(model: FastDeployModel) -> dict[str, Any]:
    return {
        "quantization": "wint2",
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "moe_quant_config": {
            "quant_type": "w4w2",
            "moe_w4_quant_config": {
                "quant_type": "wint4",
                "quant_granularity": "per_channel",
                "quant_start_layer": 0,
                # The one number that decides: experts of later layers are WINT2.
                "quant_end_layer": model.w4_end_layer,
            },
            "moe_w2_quant_config": {
                "quant_type": "wint2",
                "quant_granularity": "pp_acc",
                "quant_group_size": 64,
                "quant_start_layer": max(model.w4_end_layer + 1, model.first_moe),
                "quant_end_layer": model.layers - 1,
            },
        },
    }


def read_settings(config: Mapping[str, Any]) -> FastDeploySettings:
    """The coding of a checkpoint's experts, as FastDeploy would read its config.json.

    Raises:
        ErnieQuantError: no WINT2, another type of weights than we read, or an entry of a wrong
            kind.
    """
    if not is_fastdeploy_wint2(config):
        raise ErnieQuantError(
            "config.json describes no FastDeploy WINT2 checkpoint: quantization_config has no "
            "quantization 'wint2'"
        )
    settings = config["quantization_config"]
    moe = _object(settings, "moe_quant_config")
    w4, w2 = _object(moe, "moe_w4_quant_config"), _object(moe, "moe_w2_quant_config")
    for entries, name, readable in (
        (settings, "dense_quant_type", ("wint8",)),
        (moe, "quant_type", ("w4w2",)),
        (w4, "quant_type", ("wint4",)),
        (w2, "quant_type", ("wint2",)),
        (w2, "quant_group_size", (0, 64)),
    ):
        value = entries.get(name, readable[0])
        if value not in readable or isinstance(value, bool):
            raise ErnieQuantError(
                f"quantization_config has {name} {value!r}; only {readable[-1]!r} can be read"
            )
    end = w4.get("quant_end_layer", DEFAULT_W4_END_LAYER)
    if type(end) is not int:
        raise ErnieQuantError(f"quantization_config has quant_end_layer {end!r}; expected a number")
    record = _object(config, RECORD)
    k_order, ranks = record.get("k_order"), record.get("tensor_parallel")
    if k_order is not None and k_order not in K_ORDERS:
        raise ErnieQuantError(
            f"config.json has k_order {k_order!r}; known are {' and '.join(K_ORDERS)}"
        )
    if ranks is not None and (type(ranks) is not int or ranks < 1):
        raise ErnieQuantError(f"config.json has tensor_parallel {ranks!r}; expected a number")
    producer = record.get("producer")
    return FastDeploySettings(end, k_order, None if producer is None else str(producer), ranks)


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of the model once its weights are decoded to ``dtype``, for transformers."""
    ours = ("quantization_config", "torch_dtype", "is_quantized", RECORD)
    return {**{k: v for k, v in config.items() if k not in ours}, "dtype": dtype}


def choose_k_order(recorded: str | None, given: str | None) -> str | None:
    """The K order of a checkpoint's WINT2 codes; None if neither its record nor anybody says.

    Raises:
        ErnieQuantError: ``given`` is unknown, or is not what is recorded.
    """
    if given is not None and given not in K_ORDERS:
        raise ErnieQuantError(f"no k_order {given!r}; known are {' and '.join(K_ORDERS)}")
    if given is not None and recorded is not None and given != recorded:
        raise ErnieQuantError(
            f"k_order {given} was given, but the checkpoint says that it has {recorded}"
        )
    return given or recorded


def _object(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = entries.get(name, {})
    if not isinstance(value, dict):
        raise ErnieQuantError(f"config.json has {name} {value!r}; expected an object")
    return value
