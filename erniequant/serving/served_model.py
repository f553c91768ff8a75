"""What is known of a model before a weight is read: its format, its sizes, and how many bytes a
rank gets of it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.config import QUANTIZED_BY, quantized_by, read_json
from erniequant.checkpoint.folder import require_whole_companions
from erniequant.checkpoint.reader import TensorHeader, open_checkpoint
from erniequant.data.tokenizers import SETTINGS_FILE, has_tokenizer
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.reader import FastDeployCheckpoint, open_fastdeploy
from erniequant.formats.fastdeploy.recognise import is_fastdeploy_wint2
from erniequant.formats.registry import format_of
from erniequant.formats.rows import NATIVE
from erniequant.models.architecture import Architecture
from erniequant.models.config_check import bounded_architecture, require_fit
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.models.header_check import kept_names, sound_if_quantized
from erniequant.packing.experts import QuantizedExperts, is_quantized
from erniequant.packing.sharding import Share, bytes_of, share_params
from erniequant.paths import expanded

PLAIN, WINT2 = "plain", "fastdeploy-wint2"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_ROUTERS = (".mlp.gate.weight", ".mlp.gate.weight_1")
_BYTES = 2
"""Of a weight in bfloat16, in which everything but packed experts is kept."""


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint to be served.

    Attributes:
        name: as clients call it: the folder's name, or the Hugging Face id.
        folder: where it is, or where its small files are until `fetch`.
        is_remote: it comes from Hugging Face.
        format: `PLAIN`, `WINT2`, or "native".
        description: the format for people.
        architecture: the model that its config.json describes.
        layers: quantised layers of the native format.
        kept: tensors outside of them.
        cut_for: ranks that its files are cut for.
        has_tokenizer, has_template: what comes with it.
    """

    name: str
    folder: Path
    is_remote: bool
    format: str
    description: str
    architecture: Architecture
    layers: tuple[QuantizedExperts, ...]
    kept: tuple[TensorHeader, ...]
    cut_for: int
    has_tokenizer: bool
    has_template: bool

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        config = self.architecture.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.architecture.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.architecture.config.num_key_value_heads)

    @property
    def positions(self) -> int:
        """Positions that the model was made for."""
        return int(self.architecture.config.max_position_embeddings)

    def weight_bytes(self, ranks: int = 1, whole_experts: bool = False) -> int:
        """Bytes of the weights that the largest of ``ranks`` holds.

        whole_experts: ranks divide experts instead of cutting them (expert parallelism).

        Raises:
            ErnieQuantError: a quantised layer cannot be cut so.
        """
        packed = 0
        for layer in self.layers:
            share = Share(0, ranks)
            if whole_experts and not self.architecture.is_dense():
                share = Share(experts=tuple(range(math.ceil(layer.experts / ranks))))
            where = f"layer {layer.key}"
            params = share_params(
                layer.experts, layer.hidden, layer.inner, layer.spec, share, where
            )
            packed += bytes_of(params)
        return packed + sum(_kept_bytes(header, ranks) for header in self.kept)

    def token_bytes(self, ranks: int = 1) -> int:
        """Bytes of one token's keys and values, in bfloat16, on one of ``ranks``."""
        heads = max(1, self.kv_heads // ranks)
        return 2 * _BYTES * self.architecture.sizes.layers * heads * self.head_dim


def read_served(source: str) -> ServedModel:
    """A model by its folder or Hugging Face id, reading headers only.

    Raises:
        ErnieQuantError: it is incomplete or damaged, of a format or a version of it that this
            erniequant does not know, or no ERNIE 4.5.
    """
    if format_of(source).name == WINT2:
        return _of_fastdeploy(source, open_fastdeploy(source))
    checkpoint = open_checkpoint(source)
    if is_fastdeploy_wint2(checkpoint.config):  # from Hugging Face
        return _of_fastdeploy(source, open_fastdeploy(source))
    method = quantized_by(checkpoint.config)
    if method is not None and not is_quantized(checkpoint.config):
        raise ErnieQuantError(
            f"{checkpoint.folder} is quantised in a way that erniequant does not serve "
            f"(config.json has {method}); give one of erniequant, FastDeploy's WINT2, or bf16"
        )
    check = sound_if_quantized(checkpoint)
    layers = check.layers if check else ()
    require_fit(checkpoint.config, checkpoint.headers, {layer.key for layer in layers})
    plain = {k: v for k, v in checkpoint.config.items() if k not in QUANTIZED_BY}
    return _served(
        source,
        checkpoint.folder,
        (NATIVE, f"erniequant format {check.metadata.format_version}") if check
        else (PLAIN, "not quantised"),
        bounded_architecture(plain, checkpoint.headers),
        layers,
        tuple(checkpoint.header(name) for name in kept_names(checkpoint, layers)),
        1,
    )  # fmt: skip


def fetch(model: ServedModel) -> None:
    """Download what is not here yet of a model on Hugging Face.

    Raises:
        ErnieQuantError: the download fails.
    """
    if model.is_remote:
        open_checkpoint(model.name).fetch()


def _of_fastdeploy(source: str, opened: FastDeployCheckpoint) -> ServedModel:
    if opened.k_order is None:
        raise ErnieQuantError(
            f"{opened.folder} does not say in which order its WINT2 codes have their inputs; "
            "export it (erniequant export SRC NEW --to bf16 --reference ORIGINAL) and serve that"
        )
    headers = [header for rank in opened.ranks for header in rank.headers.values()]
    return _served(
        source, opened.folder, (WINT2, "FastDeploy WINT2"), Ernie45Moe(dict(opened.config)), (),
        tuple(headers), len(opened.ranks),
    )  # fmt: skip


def _served(
    source: str,
    folder: Path,
    kind: tuple[str, str],
    architecture: Architecture,
    layers: Iterable[QuantizedExperts],
    kept: tuple[TensorHeader, ...],
    cut_for: int,
) -> ServedModel:
    require_no_adapter(folder)
    require_whole_companions(folder)
    local = expanded(source).is_dir()
    name = folder.resolve().name if local else source
    return ServedModel(
        name, folder, not local, *kind, architecture, tuple(layers), kept, cut_for,
        has_tokenizer(folder), _has_template(folder),
    )  # fmt: skip


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _TEMPLATES):
        return True
    settings = folder / SETTINGS_FILE
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def _kept_bytes(header: TensorHeader, ranks: int) -> int:
    """Bytes of a tensor on one of several ranks: matrices are cut, all else each rank has whole.

    A router's bias is a row.
    """
    experts = ".mlp.experts." in header.name  # as they are stored; all else becomes bfloat16
    size = header.n_bytes if experts else header.elements * _BYTES
    whole = len(header.shape) < 2 or min(header.shape) < 2 or header.name.endswith(_ROUTERS)
    return size if whole else math.ceil(size / ranks)
