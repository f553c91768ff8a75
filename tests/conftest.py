"""Fixtures shared by all tests: a micro random ERNIE 4.5 MoE and a dense one, made in-process."""

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from erniequant import system
from testing.micro_model import add_tokenizer, write_micro_ernie
from tests.interpreter import patch_once_a_launch
from tests.micro import write_text
from tests.micro_vl import write_micro_vl, write_records

if os.environ.get("ERNIEQUANT_COMPILED"):
    # Kernels compiled for a card (80 or 90) run on this machine's processor: `make compiled`.
    from erniequant_kernels.ptx.driver import install

    install(int(os.environ["ERNIEQUANT_COMPILED"]))
elif not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Its own library is decorated when it is first imported,
    # by whichever test that is, so this cannot wait for tests/kernels.
    os.environ["TRITON_INTERPRET"] = "1"
    patch_once_a_launch()

Edit = Callable[[dict[str, torch.Tensor]], None]
ConfigEdit = Callable[[dict[str, Any]], Any]
FileLimit = Callable[[int], AbstractContextManager[None]]
ReadOnly = Callable[[], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """A test that draws without a generator draws the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products on one thread: operators of tiny models are over before a second has started, and
    on a busy machine wait for it for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product in float32, also where bfloat16 is faster: for comparisons of more digits."""
    monkeypatch.setattr(system, "fast_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def micro_ernie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `write_micro_ernie`."""
    return write_micro_ernie(tmp_path_factory.mktemp("micro") / "micro_ernie")


@pytest.fixture(scope="session")
def micro_source(micro_ernie: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`micro_ernie` with a tokenizer of one token per character."""
    folder = tmp_path_factory.mktemp("source") / "micro_source"
    shutil.copytree(micro_ernie, folder)
    return add_tokenizer(folder)


@pytest.fixture(scope="session")
def micro_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_text`."""
    return write_text(tmp_path_factory.mktemp("text") / "micro.txt")


@pytest.fixture(scope="session")
def micro_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `write_micro_vl`."""
    return write_micro_vl(tmp_path_factory.mktemp("micro") / "micro_vl")


@pytest.fixture(scope="session")
def packed_vl(micro_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`micro_vl` at 2 bits, without calibration."""
    import erniequant

    folder = tmp_path_factory.mktemp("packed") / "packed_vl"
    erniequant.quantize(micro_vl, folder, bits=2, no_calib=True, max_tp=1, effort="fast")
    return folder


@pytest.fixture(scope="session")
def micro_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_records`."""
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def packed_ernie(micro_ernie: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`micro_ernie` with quantised experts; any words decode, so they are random.

    Layer 1 and 2 differ in code, register length and tile, so mixing them up shows.
    """
    from erniequant.packing.schema import LayerSpec, MatrixSpec

    layers = {
        "1": LayerSpec(MatrixSpec("cc2", 12, 64, 32), MatrixSpec("cc4", 10, 32, 64)),
        "2": LayerSpec(MatrixSpec("cc3", 16, 32, 32), MatrixSpec("cc2s", 16, 32, 1)),
    }
    folder = tmp_path_factory.mktemp("packed") / "packed_ernie"
    return write_packed(micro_ernie, folder, layers)


@pytest.fixture(scope="session")
def micro_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bf16 checkpoint of a dense ERNIE 4.5.

    Hidden 96 and inner size 160 are no powers of two, 160 has no larger tile than 32, the signs of
    neither fill a power of two of words, heads are wider than 96 / 4, and the embedding is tied.
    """
    from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

    torch.manual_seed(8)
    config = Ernie4_5Config(
        vocab_size=128, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Ernie4_5ForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("micro") / "micro_dense"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_dense(micro_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`micro_dense` with the MLPs of layers 0 and 1 quantised to random words, differently.

    Layer 2 is kept as it is, so that taking it for a quantised one shows.
    """
    from erniequant.packing.schema import LayerSpec, MatrixSpec

    layers = {
        "0.mlp": LayerSpec(MatrixSpec("cc2", 12, 32, 32), MatrixSpec("cc4", 10, 32, 16)),
        "1.mlp": LayerSpec(MatrixSpec("cc3", 16, 32, 16), MatrixSpec("cc2s", 16, 32, 32)),
    }
    folder = tmp_path_factory.mktemp("packed") / "packed_dense"
    return write_packed(micro_dense, folder, layers)


def write_packed(original: Path, folder: Path, layers: Mapping[str, Any]) -> Path:
    """Write ``original`` into a new folder with random words in the layers of a description."""
    from erniequant.checkpoint import CheckpointWriter, open_checkpoint
    from erniequant.checkpoint.files import write_json
    from erniequant.data.companions import write_companions
    from erniequant.models.header_check import expert_sizes, is_dense
    from erniequant.packing.decoding import encode_scale
    from erniequant.packing.layer_keys import experts_module, guard_name, layer_key_of
    from erniequant.packing.schema import QuantizationMetadata, guard_tensor, layer_params

    source = open_checkpoint(original)
    dense = is_dense(source.config)
    generator = torch.Generator().manual_seed(5)
    with CheckpointWriter(folder, max_shard_bytes=60_000) as writer:
        for name in source.names():
            if layer_key_of(name, dense) not in layers:
                writer.add(name, source.tensor(name))
        for key, spec in layers.items():
            prefix, sizes = f"model.{experts_module(key)}.", expert_sizes(source.config, key)
            params = layer_params(*sizes, spec, guard=guard_name(key))
            for name, (shape, dtype) in params.items():
                words = torch.randint(-(2**31), 2**31, shape, generator=generator)
                tensor = words.to(dtype)
                if name.endswith("_scale"):
                    tensor = encode_scale(torch.rand(shape, generator=generator) * 0.1 + 0.02)
                elif name.endswith("_signs"):
                    tensor = tensor[:, :1].repeat(1, shape[1], 1)
                elif dtype == torch.bfloat16:
                    tensor = guard_tensor()
                writer.add(prefix + name, tensor)
        writer.finish()
    write_companions(original, folder)
    metadata = QuantizationMetadata(layers, producer="tests")
    write_json(folder / "config.json", {**source.config, "quantization_config": metadata.to_dict()})
    return folder


@pytest.fixture
def damaged(packed_ernie: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A function that writes a copy of `packed_ernie` in one file after an edit of its tensors."""
    return lambda edit: write_damaged(packed_ernie, tmp_path / "damaged", edit)


@pytest.fixture
def damaged_dense(packed_dense: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """As `damaged`, for `packed_dense`."""
    return lambda edit: write_damaged(packed_dense, tmp_path / "damaged", edit)


def write_damaged(sound: Path, folder: Path, edit: Edit) -> Path:
    """Write a copy of a checkpoint in one file after an edit of its tensors."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(sound.glob("*.safetensors")):
        tensors |= load_file(shard)
    edit(tensors)
    folder.mkdir()
    shutil.copy(sound / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def with_config(tmp_path: Path) -> Callable[[Path, ConfigEdit], Path]:
    """A function that copies a checkpoint and edits its config.json."""

    def write(source: Path, edit: ConfigEdit) -> Path:
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / source.name
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def files_of_at_most() -> FileLimit:
    """A context in which the system refuses to let any file grow beyond so many bytes: a disk that
    is full, without one."""

    @contextmanager
    def limited(n_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReadOnly:
    """A context in which nothing can be made, renamed or deleted in the working directory.

    That is a new folder in ``tmp_path``. Rights do not bind root, who is nobody in the context.
    """
    folder = tmp_path / "here"
    folder.mkdir()
    # Nobody may not pass through tmp_path, so only relative names work.
    monkeypatch.chdir(folder)

    @contextmanager
    def locked() -> Iterator[None]:
        user = os.geteuid()
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)
            folder.chmod(0o755)

    return locked
