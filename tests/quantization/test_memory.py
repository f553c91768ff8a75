"""Memory: sizes as people write them, and a plan that gives up speed only where it has to."""

import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest

from erniequant import system
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.models.registry import architecture_of
from erniequant.quantization.memory import (
    BASE_BYTES,
    MemoryInputs,
    MemoryPlan,
    available_memory,
    default_budget,
    largest_layer,
    parse_size,
    plan_memory,
)

# No two sizes are the same, and 6 experts are fewer than 8 threads.
SETTINGS: dict[str, Any] = dict(
    model_type="ernie4_5_moe", vocab_size=128, hidden_size=96, intermediate_size=160,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, moe_num_experts=6, moe_k=2,
    moe_intermediate_size=64, moe_num_shared_experts=1, moe_layer_start_index=1,
    tie_word_embeddings=True,
)  # fmt: skip


LAYER = 150_000
"""Bytes of the largest layer without experts, as stored."""


def plan(
    budget: int, tokens: int = 900, threads: int = 4, length: int = 64, on_cpu: bool = True
) -> MemoryPlan:
    model = architecture_of(SETTINGS)
    return plan_memory(model, MemoryInputs(tokens, length, 0, LAYER), threads, budget, on_cpu)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("123", 123),
        ("1B", 1),
        ("7k", 7_000),
        ("7KB", 7_000),
        ("7 KiB", 7 * 1024),
        ("500M", 500_000_000),
        ("500mb", 500_000_000),
        ("3Mi", 3 * 1024**2),
        ("16GB", 16_000_000_000),
        (" 24GiB\n", 24 * 1024**3),
        ("0.5g", 500_000_000),
        ("1.25 TiB", 5 * 1024**4 // 4),
        ("2T", 2_000_000_000_000),
    ],
)
def test_sizes_are_read_in_every_unit(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1", "-1GB", "1,5GB", "1e9", "0x10", "16 gigabytes", "16PB", "1I", "1IB", "1BB",
     "1G B", ".5G", "1.GB", "inf", "nan", "1 2G", "16GB\nx"],
)  # fmt: skip
def test_other_sizes_are_refused_with_an_example(text: str) -> None:
    refused = rf"^{re.escape(repr(text))} is not a size; write for example 16GB or 500MB\Z"
    with pytest.raises(ErnieQuantError, match=refused):
        parse_size(text)


def test_memory_comes_before_disk_and_disk_before_fewer_experts() -> None:
    found = [plan(10**12)]
    while True:
        # One byte less than what the last way takes.
        following = plan(found[-1].peak_bytes - 1)
        if following == found[-1]:
            break
        assert following.peak_bytes < found[-1].peak_bytes
        found.append(following)
    ways = [(way.experts_at_once, way.tables_on_disk) for way in found]
    assert ways == [(4, False), (4, True), (3, True), (2, True), (1, True)]
    # Each way is taken as soon as it fits.
    for way in found:
        assert plan(way.peak_bytes) == way
    # What goes to disk is what no longer counts as memory.
    assert found[0].scratch_bytes == 0
    assert found[1].peak_bytes + found[1].scratch_bytes == found[0].peak_bytes


def test_a_budget_of_nothing_gives_the_least_there_is() -> None:
    least = plan(0)
    assert (least.experts_at_once, least.tables_on_disk) == (1, True)
    others = [plan(budget) for budget in range(least.peak_bytes, 2 * least.peak_bytes, 10**7)]
    assert least.peak_bytes == min(way.peak_bytes for way in others)


def test_there_are_never_more_experts_than_the_model_has_or_threads() -> None:
    for threads in (1, 2, 5, 6, 7, 64):
        assert plan(10**12, threads=threads).experts_at_once == min(threads, 6)


def test_without_tokens_there_are_no_tables_but_still_a_budget() -> None:
    roomy, least = plan(10**12, tokens=0), plan(0, tokens=0)
    assert (roomy.experts_at_once, least.experts_at_once) == (4, 1)
    for way in (roomy, least):
        assert not way.tables_on_disk and way.scratch_bytes == 0
    assert least.peak_bytes < roomy.peak_bytes
    assert plan(roomy.peak_bytes - 1, tokens=0).experts_at_once == 3


@pytest.mark.parametrize("budget", [10**12, 0])
def test_more_text_and_more_threads_never_take_less(budget: int) -> None:
    def peaks(name: str, values: list[int]) -> list[tuple[int, int]]:
        found = [plan(budget, **{name: value}) for value in values]
        return [(way.peak_bytes, way.scratch_bytes) for way in found]

    # Around the chunk of 1024 and the sample of 2048 tokens; windows longer than all tokens.
    tokens = peaks("tokens", [0, 1, 1023, 1024, 1025, 2047, 2048, 2049, 10**5, 10**8])
    threads = peaks("threads", [1, 2, 3, 6, 7, 64])
    lengths = peaks("length", [1, 64, 899, 900, 901, 10**5])
    for steps in (tokens, threads, lengths):
        for (peak, scratch), (next_peak, next_scratch) in itertools.pairwise(steps):
            assert next_peak >= peak and next_scratch >= scratch
    assert tokens[-1] > tokens[0] and threads[-1] > threads[0]
    assert lengths[-1] == lengths[-2] == lengths[-3]


def test_the_prediction_is_what_its_parts_add_up_to() -> None:
    # 900 tokens in windows of 64, three threads; hidden 96, inner 64, six experts of which two.
    # A window in it, of 4 * 96 channels at the widest (2 * 160 is less).
    window = 4 * 64 * (3 * 384 + 6 * 96)
    # Both streams of hidden states, both inputs and their drift, the quantised stream before the
    # layer and its inputs once more; ids and weights of two experts.
    tables = 900 * (4 * 7 * 96 + 2 * 2 * (8 + 4))
    # Moments and cross moments; a sample of all 900 tokens.
    shared = 2 * 4 * 96 * 96 + 900 * 4 * 3 * 96
    # One expert: factorising its larger Hessian (two float64, three float32) beside gate and up
    # twice; metrics and factors of 128 outputs; a chunk of all tokens.
    expert = (
        (16 + 12) * 96 * 96 + 36 * 128 * 128 + 2 * (4 * 2 * 64 * 96) + 900 * 4 * (6 * 96 + 9 * 64)
    )
    # Its tables: it may have twice the mean of 900 * 2 / 6 tokens, and has the sample.
    own = 4 * ((600 + 900) * 2 * 64 + 600 * 2 * 96)
    found = plan(10**12, threads=3)
    assert LAYER + 3 * window < shared + 3 * expert
    assert found.peak_bytes == BASE_BYTES + shared + 3 * expert + tables + 3 * own
    assert (found.vram_bytes, found.scratch_bytes) == (0, 0)
    least = plan(0, threads=3)
    assert least.peak_bytes == BASE_BYTES + shared + expert
    assert least.scratch_bytes == tables + own
    # Forty windows at once take more than one expert.
    wide = plan(0, threads=40)
    assert wide.peak_bytes == BASE_BYTES + LAYER + 40 * window
    # On a GPU, windows pass one at a time.
    gpu = plan(0, threads=40, on_cpu=False)
    assert gpu.peak_bytes == least.peak_bytes
    assert gpu.vram_bytes == max(LAYER + window, expert)


def test_the_largest_layer_is_counted_as_it_is_stored(micro_ernie: Path) -> None:
    # Queries, keys, values, output, two norms, and the dense MLP of layer 0, which is larger than
    # the router and shared experts of the others; bfloat16.
    attention = 96 * 96 + 2 * 48 * 96 + 96 * 96 + 2 * 96
    dense, moe = 3 * 96 * 160, 2 * (8 * 96 + 8) + 3 * 96 * 128
    assert dense > moe
    checkpoint = open_checkpoint(micro_ernie)
    found = largest_layer(checkpoint, architecture_of(checkpoint.config))
    assert found == 2 * (attention + dense)


def test_available_memory_is_between_nothing_and_all_there_is() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() < total
    assert 0 < default_budget() < total


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Limited by the machine, by the group, or not by the group at all.
        ({"memory.max": "9000000\n", "memory.current": "1\n"}, 5000 * 1024),
        ({"memory.max": "9000000\n", "memory.current": "8000000\n"}, 1_000_000),
        ({"memory.max": "max\n", "memory.current": "8000000\n"}, 5000 * 1024),
        ({}, 5000 * 1024),
    ],
)
def test_available_memory_is_that_of_the_machine_within_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files["proc/meminfo"] = "MemTotal:  9000 kB\nMemFree:   1 kB\nMemAvailable:   5000 kB\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(system, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert available_memory() == expected


def test_a_system_without_such_files_counts_all_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "Path", lambda name: tmp_path / name.lstrip("/"))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory() == total
