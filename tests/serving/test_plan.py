"""Every reason not to start a server is one line, told before a weight is read. Where there is
none, the command is exactly this."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from erniequant.errors import ErnieQuantError
from erniequant.serving import installed as installations
from erniequant.serving.machine import Machine
from erniequant.serving.plan import ServePlan, make_plan
from erniequant.serving.served_model import ServedModel, read_served
from erniequant.serving.settings import ServeSettings
from tests.serving.conftest import CPU, GB, GPUS, NO_VLLM, NOTHING, VLLM_CPU, VLLM_GPU

Given = dict[str, Any]
Planner = Callable[..., ServePlan]


@pytest.fixture
def plan(model: ServedModel, free_port: int) -> Planner:
    """A plan for a machine with vllm-cpu, unless other things are given."""

    def make(
        of: ServedModel = model,
        installed: installations.Installed = VLLM_CPU,
        machine: Machine = CPU,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> ServePlan:
        asked = ServeSettings(**{"model": "m", "port": free_port, **settings}).effective()
        return make_plan(asked, of, installed, machine, environment or {})

    return make


def stock(plan: ServePlan) -> list[str]:
    """The command of a plan for vLLM without the user's arguments."""
    settings = plan.settings
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(plan.model.folder), "--served-model-name", "cut-in-two",
        "--host", settings.host, "--port", str(settings.port),
        "--tensor-parallel-size", str(settings.ranks), "--dtype", "bfloat16",
        "--max-model-len", "auto",
    ]  # fmt: skip


def test_vllm_on_the_cpu(plan: Planner) -> None:
    found = plan()
    assert (found.engine, found.title) == ("vllm", "vLLM 0.32.0 on the CPU")
    assert list(found.command.arguments) == stock(found)
    # Four texts of 256 tokens take 0.8 MB, and vLLM counts in GiB.
    assert found.command.environment == {"VLLM_CPU_KVCACHE_SPACE": "1"}
    assert (found.problems, found.notes) == ((), ())
    assert found.url == f"http://127.0.0.1:{found.settings.port}/v1"


def test_vllm_on_two_gpus(plan: Planner) -> None:
    """Nothing but the command: what the CPU needs is not set."""
    found = plan(installed=VLLM_GPU, machine=GPUS, ranks=2)
    assert found.title == "vLLM 0.32.0 on the GPU"
    assert list(found.command.arguments) == stock(found)
    assert (found.command.environment, found.problems) == ({}, ())
    assert found.memory is not None
    assert found.memory.weights == found.model.weight_bytes(2)
    assert (found.memory.available, found.memory.ranks) == (int(0.92 * 80 * GB), 1)


def test_ranks_on_the_cpu_share_processors(plan: Planner) -> None:
    """5 of them, with a gap in their numbers: one is left over."""
    found = plan(ranks=2)
    assert found.command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert list(found.command.arguments) == stock(found)
    # A NUMA node for each rank is what vLLM finds by itself.
    two_nodes = plan(ranks=2, machine=replace(CPU, nodes=2))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in two_nodes.command.environment


def test_variables_of_the_user_stay(plan: Planner) -> None:
    theirs = {"VLLM_CPU_KVCACHE_SPACE": "9", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found = plan(ranks=2, environment=theirs)
    assert found.command.environment == {} and found.memory is not None
    assert found.memory.cache == 9 * 2**30
    bytes_given = plan(arguments=("--kv-cache-memory-bytes", "1000000000"))
    assert bytes_given.command.environment == {}


def test_arguments_of_the_user_win(plan: Planner) -> None:
    given = ("--max_model_len=128", "--dtype", "float32", "--seed", "3")
    found = plan(arguments=given)
    expected = stock(found)
    del expected[expected.index("--dtype") : expected.index("--max-model-len") + 2]
    assert list(found.command.arguments) == [*expected, *given]


def test_memory_for_keys_and_values_is_bounded(model: ServedModel, plan: Planner) -> None:
    """4 texts of 2**20 positions of 768 bytes take 3 GiB; half of what 6 GB leave is 2 GiB."""
    long = read_served(str(model.folder))
    long.architecture.config.max_position_embeddings = 2**20
    assert plan(of=long).command.environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    small = plan(of=long, machine=replace(CPU, memory=int(6.2 * GB)))
    assert small.command.environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert small.problems == ()


def test_the_key_is_passed_in_the_environment_only(plan: Planner) -> None:
    found = plan(api_key="sesame")
    assert list(found.command.arguments) == stock(found)
    assert found.command.environment["VLLM_API_KEY"] == "sesame"
    assert found.to_dict()["api_key"] is True
    for text in (found.command.line(), str(found.to_dict()), repr(found)):
        assert "sesame" not in text
    assert "VLLM_API_KEY=" in found.command.line()


def test_the_line_can_be_typed(plan: Planner) -> None:
    """A value with a space is quoted."""
    line = plan(arguments=("--chat-template", "my template.jinja")).command.line()
    assert line.startswith(f"VLLM_CPU_KVCACHE_SPACE=1 {sys.executable} -m vllm.")
    assert line.endswith("--chat-template 'my template.jinja'")


def test_transformers_where_vllm_is_missing(plan: Planner) -> None:
    found = plan(installed=NO_VLLM, arguments=("--device", "cpu"))
    assert found.engine == "transformers"
    assert found.title == "transformers 5.20.0's own server on the CPU"
    assert list(found.command.arguments) == [
        sys.executable, "-m", "erniequant.serving.transformers_server", str(found.model.folder),
        "serve", "cut-in-two", "--host", "127.0.0.1", "--port", str(found.settings.port),
        "--device", "cpu",
    ]  # fmt: skip
    assert (found.command.environment, found.problems) == ({}, ())
    assert any("one request at a time" in note for note in found.notes)
    assert plan(engine="transformers").engine == "transformers"
    on_gpu = plan(installed=NO_VLLM, machine=GPUS)
    assert on_gpu.title.endswith("on the GPU") and on_gpu.memory is not None
    assert on_gpu.memory.available == 80 * GB


@pytest.mark.parametrize(
    "given, line",
    [
        ({"ranks": 2}, "--tp 2: transformers' server is one process; install vLLM"),
        ({"api_key": "k"}, "--api-key: transformers' server asks for no key; leave it out, or"),
    ],
)
def test_transformers_lacks(plan: Planner, given: Given, line: str) -> None:
    (found,) = plan(installed=NO_VLLM, **given).problems
    assert found.startswith(line)


def test_nothing_is_installed(plan: Planner) -> None:
    with pytest.raises(ErnieQuantError, match="vLLM is not installed, and transformers' server "
                       "lacks fastapi, uvicorn; pip install 'erniequant\\[vllm\\]'.*"
                       "pip install 'erniequant\\[serving\\]'"):  # fmt: skip
        plan(installed=NOTHING)
    with pytest.raises(ErnieQuantError, match="--engine vllm: vLLM is not installed; pip install"):
        plan(installed=NO_VLLM, engine="vllm")
    with pytest.raises(ErnieQuantError, match="^transformers' server lacks fastapi, uvicorn; pip"):
        plan(installed=replace(NOTHING, distribution="vllm"), engine="transformers")


@pytest.mark.parametrize(
    "given, line",
    [
        (
            {"installed": replace(VLLM_CPU, vllm="0.31.9")},
            "vLLM 0.31.9 is older than 0.32, .*; upgrade it, or .*transformers",
        ),
        ({"installed": VLLM_GPU}, "vLLM 0.32.0 is made for GPUs, and torch finds none here"),
        ({"installed": replace(VLLM_CPU, plugins=())}, "vLLM would not find erniequant's plugin"),
        ({"environment": {"VLLM_PLUGINS": "a,b"}}, "VLLM_PLUGINS=a,b keeps .*; add erniequant"),
        ({"environment": {"VLLM_PLUGINS": ""}}, "VLLM_PLUGINS= keeps vLLM from loading"),
        ({"ranks": 8}, "--tp 8 needs as many processors, and there are 5"),
        (
            {"ranks": 4, "installed": VLLM_GPU, "machine": GPUS},
            "--tp 4 needs as many GPUs, and .*2",
        ),
        (
            {"ranks": 4},
            "layer 1: gate_up_proj has tiles of 64 outputs, .* quantise with --max-tp 4",
        ),
        ({"ranks": 3}, "num_attention_heads is 4, which cannot be divided among 3 ranks"),
        ({"ranks": 3}, "vocab_size, padded to a multiple of 64 is 128, which cannot be divided"),
        ({"ranks": 3}, "intermediate_size is 160, which cannot be divided among 3 ranks"),
        ({"ranks": 3}, "the inner size of shared experts is 256, which cannot be divided"),
        ({"ranks": 3}, "num_key_value_heads is 2, which can be neither divided nor repeated"),
        ({"ranks": 16}, "--tp 16 is more than the 8 experts of a layer"),
        ({"machine": replace(CPU, memory=GB)}, "the model needs 2.9 GB, .* has 1.0 GB; use a "),
        ({"ranks": 2, "machine": replace(CPU, memory=GB)}, "the model needs 5.8 GB on 2 ranks"),
        ({"host": "300.0.0.1"}, "--host 300.0.0.1 cannot be resolved: "),
        ({"host": "192.0.2.1"}, "nothing can listen at 192.0.2.1, port "),
    ],
)
def test_problems(plan: Planner, given: Given, line: str) -> None:
    problems = plan(**given).problems
    assert any(re.match(line, problem) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_little_memory_of_a_card(plan: Planner) -> None:
    small = replace(GPUS, cards=(10**5, 80 * GB))
    (line,) = plan(installed=VLLM_GPU, machine=small).problems
    assert "but the GPU has 0.1 MB; give more GPUs with --tp" in line


def test_a_port_that_is_taken(plan: Planner, taken_port: int) -> None:
    (line,) = plan(port=taken_port).problems
    assert line == (
        f"port {taken_port} of 127.0.0.1 is taken by another program; give another with --port"
    )
    # What counts is where the server will listen.
    assert plan(arguments=("--port", str(taken_port))).problems == (line,)


def test_heads_that_attention_on_the_cpu_does_not_take(plan: Planner, talker: Path) -> None:
    of = read_served(str(talker))
    (line,) = plan(of=of).problems
    assert line.startswith("the model has attention heads of size 24; vLLM's attention on the CPU")
    assert plan(of=of, installed=VLLM_GPU, machine=GPUS).problems == ()
    assert plan(of=of, installed=NO_VLLM).problems == ()


def test_whole_experts_need_no_cut(plan: Planner, talker: Path) -> None:
    """The tiles of the model are as large as an expert."""
    of, gpus = read_served(str(talker)), {"installed": VLLM_GPU, "machine": GPUS, "ranks": 2}
    (line,) = plan(of=of, **gpus).problems
    assert line.startswith("layer 1: gate_up_proj has tiles of 64 outputs")
    assert plan(of=of, **gpus).memory is None
    divided = plan(of=of, **gpus, arguments=("--enable-expert-parallel",))
    assert divided.problems == () and divided.memory is not None


def test_a_dense_model_has_no_experts_to_divide(plan: Planner, packed_dense: Path) -> None:
    """Its MLP is cut or not at all: 160 is five tiles of 32."""
    of = read_served(str(packed_dense))
    found = plan(of=of, ranks=2, arguments=("--enable-expert-parallel", "--skip-tokenizer-init"))
    (line,) = found.problems
    assert line.startswith("layer 0.mlp: gate_up_proj has tiles of 32 outputs, so 160 cannot")


def test_vision_tower_is_cut_too(plan: Planner, packed_vl: Path) -> None:
    """Its 2 heads are too few for four ranks."""
    found = plan(of=read_served(str(packed_vl)), ranks=4, installed=VLLM_GPU, machine=GPUS)
    assert (
        "num_heads of vision_config is 2, which cannot be divided among 4 ranks" in found.problems
    )


@pytest.mark.parametrize("installed", [VLLM_CPU, NO_VLLM])
def test_without_tokenizer_or_template(
    plan: Planner, divisible: Path, tmp_path: Path, installed: installations.Installed
) -> None:
    folder = shutil.copytree(divisible, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    found = plan(of=read_served(str(folder)), installed=installed)
    assert found.problems == ()
    assert any("no chat template: /v1/completions works" in note for note in found.notes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (line,) = plan(of=read_served(str(folder)), installed=installed).problems
    assert line == f"{folder} has no tokenizer; copy the original's into it"


@pytest.mark.parametrize(
    "version, note",
    [
        ("0.33.2", None),
        ("0.34.0", "newer than 0.33"),
        ("nightly", "unknown; 0.32 or newer is needed"),
    ],
)
def test_newer_versions_only_warn(plan: Planner, version: str, note: str | None) -> None:
    found = plan(installed=replace(VLLM_CPU, vllm=version))
    assert found.problems == ()
    assert [note in line for line in found.notes] == ([True] if note else [])


def test_who_can_reach_the_server_is_told(plan: Planner) -> None:
    def notes(**given: Any) -> list[str]:
        return [note for note in plan(**given).notes if "everybody" in note]

    assert not notes(host="127.0.0.2") and not notes(host="localhost")
    assert notes(host="0.0.0.0") and not notes(host="0.0.0.0", api_key="k")
    assert not notes(host="0.0.0.0", environment={"VLLM_API_KEY": "k"})
    environment = {"VLLM_API_KEY": "k"}
    found = plan(host="0.0.0.0", installed=NO_VLLM, environment=environment)
    assert any("everybody" in note for note in found.notes)
    assert any("asks for no key" in note for note in found.notes)


def test_the_rule_of_vllms_platforms() -> None:
    assert VLLM_CPU.vllm_on_cpu({})
    assert replace(VLLM_GPU, vllm="0.32.0+cpu").vllm_on_cpu({})
    assert replace(VLLM_GPU, platform="darwin").vllm_on_cpu({})
    assert VLLM_GPU.vllm_on_cpu({"VLLM_TARGET_DEVICE": "cpu"})
    assert not VLLM_GPU.vllm_on_cpu({})
