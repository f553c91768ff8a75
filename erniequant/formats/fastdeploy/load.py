"""Run a FastDeploy checkpoint in transformers, its experts packed as they are stored."""

from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.codes.ccq.decode import decode_wint2
from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.formats.fastdeploy.export import detect_k_order
from erniequant.formats.fastdeploy.names import BIAS, PROJECTIONS, WINT2_SUFFIXES, Matrix
from erniequant.formats.fastdeploy.packers import WINT4
from erniequant.formats.fastdeploy.reader import FastDeployCheckpoint, open_fastdeploy
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.runtime.fastdeploy_experts import Decoder, FastDeployExperts

_GENERATION_FILE = "generation_config.json"


def load_fastdeploy(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype | str,
    k_order: str | None = None,
    reference: str | Path | None = None,
) -> Any:
    """The stock model with `FastDeployExperts`; everything else is decoded.

    Args:
        source: folder, with or without rank folders, or Hugging Face id.
        dtype: type of weights and activations; "auto" is bfloat16.
        k_order: K order of WINT2, if the files do not record it.
        reference: the original, from which the K order is detected.

    Raises:
        ErnieQuantError: a tensor is missing, left over, or of another kind than FastDeploy asks
            for, or nobody says which K order it has.
    """
    import transformers

    from erniequant.integrations.transformers.fastdeploy_quantizer import FastDeployQuantizer

    opened = open_fastdeploy(source, k_order)
    require_no_adapter(opened.folder)
    if opened.k_order is None and reference is not None:
        opened.k_order = detect_k_order(opened, open_checkpoint(reference))
    for rank in opened.ranks:
        rank.fetch()
    wanted = torch.bfloat16 if isinstance(dtype, str) else dtype
    with wrap_errors(f"transformers cannot build the model of {opened.folder}"):
        config = Ernie45Moe.config_class()(**opened.config)
        with torch.device("meta"):
            model: Any = getattr(transformers, Ernie45Moe.model_class)(config)
        # Its buffers are computed, not stored.
        rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    for layer in opened.model.moe_layers:
        model.model.layers[layer].mlp.experts = _experts(opened, layer, config.hidden_act, wanted)
    state = {
        Ernie45Moe.name_in_memory(name): _typed(name, opened, wanted)
        for name in opened.names()
        if ".mlp.experts." not in name
    }
    for layer in opened.model.moe_layers:
        bias = Ernie45Moe.name_in_memory(f"model.layers.{layer}.mlp.{BIAS}")
        state.setdefault(bias, torch.zeros(1, opened.model.experts))
    info = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    lacking = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if lacking or info.unexpected_keys:
        name = (lacking or info.unexpected_keys)[0]
        raise ErnieQuantError(f"{opened.folder}: tensor {name} is missing or left over")
    if (opened.folder / _GENERATION_FILE).is_file():
        with wrap_errors(f"transformers cannot read {opened.folder / _GENERATION_FILE}"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                opened.folder, local_files_only=True
            )
    model.name_or_path = str(opened.folder)
    model.requires_grad_(False)
    FastDeployQuantizer().attach(model)
    with wrap_errors(f"the model of {opened.folder} cannot be moved to {device}"):
        return model.to(device)


def _experts(
    opened: FastDeployCheckpoint, layer: int, activation: str, dtype: torch.dtype
) -> FastDeployExperts:
    """The experts of a layer, packed; of rank folders, decoded to ``dtype``."""
    count = opened.model.experts
    by_expert = {
        part.expert: part
        for part in opened.parts.values()
        if isinstance(part, Matrix) and part.expert is not None and part.expert[0] == layer
    }
    if len(opened.ranks) > 1:
        return _decoded_experts(opened, by_expert, layer, activation, dtype)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    decode: dict[str, Decoder] = {}
    for projection in PROJECTIONS:
        matrices = [by_expert[layer, expert, projection] for expert in range(count)]
        stored = [opened.keys_of(matrix, opened.ranks[0]) for matrix in matrices]
        parts[projection] = {
            suffix: torch.stack([tensors[suffix] for tensors in stored]) for suffix in stored[0]
        }
        decode[projection] = _decoder(opened, matrices[0])
    wint2 = opened.model.expert_format(layer) == "wint2"
    order = opened.k_order if wint2 else None
    return FastDeployExperts(parts, decode, activation, _weights(opened), order)


def _decoded_experts(
    opened: FastDeployCheckpoint,
    by_expert: dict[tuple[int, int, str], Matrix],
    layer: int,
    activation: str,
    dtype: torch.dtype,
) -> FastDeployExperts:
    """Experts of rank folders: a rank may have scales and code books of its own, so codes of
    several do not join."""
    parts = {}
    for projection in PROJECTIONS:
        decoded = []
        for expert in range(opened.model.experts):
            matrix = by_expert[layer, expert, projection]
            whole = opened.decode(matrix, opened.k_order)
            decoded.append(torch.cat([whole[name] for name in matrix.sources]).to(dtype))
        parts[projection] = {"weight": torch.stack(decoded)}
    plain: Decoder = lambda tensors: tensors["weight"]  # noqa: E731
    return FastDeployExperts(parts, dict.fromkeys(PROJECTIONS, plain), activation, _weights(opened))


def _decoder(opened: FastDeployCheckpoint, matrix: Matrix) -> Decoder:
    if matrix.format == "wint4":
        return lambda tensors: (
            WINT4.dequantize(tensors["quant_weight"].cpu(), tensors["weight_scale"].cpu())
            .T.contiguous()
            .to(tensors["weight_scale"].device)
        )
    order = opened.k_order
    if order is None:
        raise ErnieQuantError(
            f"{opened.folder} does not say in which order its WINT2 codes have their inputs; give "
            "k_order (mma64 since July 2025, plain before) or the original to compare with"
        )
    return lambda tensors: decode_wint2(
        *(tensors[s] for s in WINT2_SUFFIXES), k_order=order
    ).T.contiguous()


def _weights(opened: FastDeployCheckpoint) -> int:
    return 3 * opened.model.experts * opened.model.hidden * opened.model.inner


def _typed(name: str, opened: FastDeployCheckpoint, dtype: torch.dtype) -> torch.Tensor:
    tensor = opened.tensor(name)
    # transformers keeps routers and their biases in float32.
    stays = ".mlp.gate." in name or Ernie45Moe.optional(name)
    return tensor.float() if stays else tensor.to(dtype)
