"""vLLM's ERNIE 4.5 mixture for FastDeploy's checkpoints: WINT2 experts stay packed, everything else
is decoded as it is read."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.models.ernie45_moe import Ernie4_5_MoeForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from erniequant.checkpoint.reader import Checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.config import RECORD
from erniequant.formats.fastdeploy.names import Matrix, Plain
from erniequant.formats.fastdeploy.reader import FastDeployCheckpoint
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.packing.sharding import Share
from erniequant.serving.vllm.fastdeploy_config import open_known
from erniequant.serving.vllm.loading import require_loaded
from erniequant.serving.vllm.wint2_experts import Wint2ExpertsMethod


class ErnieQuantFastDeploy(Ernie4_5_MoeForCausalLM):
    """Registered under `fastdeploy_config.ARCHITECTURE`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        self._source, self._dtype = model.model, model.dtype
        self._record: dict[str, Any] = getattr(model.hf_config, RECORD, None) or {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names of the parameters that were loaded.

        weights: not used, as they have FastDeploy's names and layouts, or lie in rank folders.

        Raises:
            ErnieQuantError: the checkpoint is damaged, or was cut for another number of ranks.
        """
        opened = open_known(self._source, self._record)
        for rank in opened.ranks:
            rank.fetch()
        packed = set(self._load_packed(opened))
        loaded = super().load_weights(_decoded(opened, self._dtype)) | packed
        counted = [path for path, _, _ in self._packed_layers()]
        require_loaded(self, loaded, counted)
        return loaded

    def _packed_layers(self) -> Iterator[tuple[str, Any, Wint2ExpertsMethod]]:
        for path, module in self.named_modules():
            if isinstance(module, RoutedExperts):
                method: Any = module.quant_method
                if isinstance(method, Wint2ExpertsMethod):
                    yield path, module, method

    def _load_packed(self, opened: FastDeployCheckpoint) -> Iterator[str]:
        """Load the rank's share of WINT2; yields parameters, once for each matrix."""
        matrices: dict[int, dict[str, Matrix]] = defaultdict(dict)
        for part in opened.parts.values():
            if isinstance(part, Matrix) and part.expert is not None:
                matrices[part.expert[0]][part.prefix] = part
        for path, layer, method in self._packed_layers():
            folder, whole = _folder(opened, method.share)
            for part in matrices[extract_layer_index(path)].values():
                if method.holds(part):
                    stored = opened.keys_of(part, folder)
                    for name in method.load_matrix(layer, part, stored, whole):
                        yield f"{path}.{name}"


def _folder(opened: FastDeployCheckpoint, share: Share) -> tuple[Checkpoint, bool]:
    """The files from which a rank takes its packed experts, and whether they hold whole ones.

    Codes of rank folders are not joined: each may have code books of its own.

    Raises:
        ErnieQuantError: there are another number of rank folders than of ranks.
    """
    folders = len(opened.ranks)
    if folders == 1:
        return opened.ranks[0], True
    if folders == share.ranks and share.experts is None:
        return opened.ranks[share.rank], False
    raise ErnieQuantError(
        f"{opened.folder} was cut for {folders} ranks; serve it with --tensor-parallel-size "
        f"{folders} and without expert parallelism, or give the checkpoint that is not cut"
    )


def _decoded(
    opened: FastDeployCheckpoint, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The original's tensors, but for WINT2."""
    for name, part in opened.parts.items():
        if isinstance(part, Matrix) and part.format == "wint2":
            continue
        if isinstance(part, Plain) and part.optional and part.key not in opened.ranks[0].headers:
            yield name, torch.zeros(part.shape)  # vLLM leaves it uninitialised
            continue
        tensor = opened.tensor(name)
        # vLLM, like transformers, has routers and their biases in float32.
        in_full = ".mlp.gate." in name or Ernie45Moe.optional(name)
        yield name, tensor.float() if in_full else tensor.to(dtype)
