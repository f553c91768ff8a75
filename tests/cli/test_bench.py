"""`bench` and `eval speed`: what reaches a user, with and without a GPU."""

import copy
import functools
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from erniequant_cli import tables
from erniequant_kernels.bench.rows import Ratio, Row


def test_kernels_refuses_without_a_gpu_and_says_what_to_do(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "kernels")
    assert result.exit_code == 1
    assert "bench static" in result.stderr
    assert result.stderr.count("\n") == 1


def test_kernels_on_the_cpu(run, monkeypatch, tmp_path):
    from erniequant_kernels.bench.cpu import methods
    from erniequant_kernels.bench.cpu import run as bench

    monkeypatch.setattr(methods, "HELD_BYTES", 2**16)
    monkeypatch.setattr(bench, "TRIAD_NUMBERS", 1000)
    monkeypatch.setattr(bench, "ENOUGH_ROUNDS", 5)
    monkeypatch.setattr(bench, "others_seconds", lambda: 0.0)
    out, plot = tmp_path / "cpu.json", tmp_path / "cpu.svg"
    result = run(
        *("bench", "kernels", "--device", "cpu", "--shape", "tiny", "--tokens", "1,5"),
        *("--bits", "2,wint2", "--threads", 1, "--json", out, "--plot", plot),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "triad_gb_per_s", "rows", "ratios"}
    assert found["machine"]["threads"] == 1 and found["triad_gb_per_s"] > 0
    # tiny has inner sizes that WINT2 does not take.
    assert [(row["tokens"], row["bits"]) for row in found["rows"]] == [
        (tokens, bits) for tokens in (1, 5) for bits in (2, 16, 32)
    ]
    assert len(found["ratios"]) == 4 and "<svg" in plot.read_text()
    lines = result.stdout.splitlines()
    assert "speed-up" in result.stdout and "triad" in result.stdout
    assert lines[1].split()[:5] == ["tiny", "1", "erniequant", "2", "bits"]


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--device", "tpu"], "choose from cuda and cpu"),
        (["--device", "cpu", "--bits", "5"], "choose from 2, 3, 4"),
        (["--bits", "wint4"], "choose from 2, 3, 4, wint2"),
        (["--threads", "2"], "is for --device cpu"),
        (["--device", "cpu", "--shape", "7b"], "choose from 21b"),
    ],
)
def test_kernels_refuses_what_it_does_not_measure(run, options, reason):
    result = run("bench", "kernels", *options)
    assert result.exit_code == 2 and reason in result.stderr


def test_more_threads_than_cores_are_refused(run):
    result = run("bench", "kernels", "--device", "cpu", "--threads", 100_000)
    assert result.exit_code == 1 and "may use" in result.stderr


def test_static_refuses_in_the_interpreter(run, monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # off where a GPU is
    result = run("bench", "static")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "TRITON_INTERPRET" in result.stderr


def test_the_table_says_where_bfloat16_wins(capsys):
    won = Ratio("21b", 1, "erniequant 2 bits", "bf16 Triton", 3.25, 3.0, 3.5, 30)
    lost = Ratio("21b", 2048, "erniequant 2 bits", "bf16 torch grouped_mm", 0.8, 0.7, 0.9, 30)
    tables.print_ratios([won, lost], "a card")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "3.25" in first and "packed is faster" in first and "3.00 … 3.50" in first
    assert "0.80" in second and "decoded is faster" in second


def test_a_method_that_did_not_run_says_why(capsys):
    tables.print_bench_row(Row("21b", 4, "bf16 torch", 16, reason="needs sm_90"), first=True)
    heading, line = capsys.readouterr().out.splitlines()
    assert "GB/s" in heading and line.endswith("did not run: needs sm_90")


@pytest.fixture
def small():
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    config = Ernie4_5_MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        moe_num_experts=4, moe_k=2, moe_intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    return Ernie4_5_MoeForCausalLM(config).eval()


def test_speed_measures_both_models(run, small, monkeypatch, tmp_path):
    monkeypatch.setattr("erniequant_cli.loading.load_model", lambda *_: (small, None))
    out = tmp_path / "speed.json"
    result = run(
        *("eval", "speed", "a", "--reference", "b", "--prompt", 10, "--new", 3),
        *("--repetitions", 2, "--json", out),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(out.read_text())
    for model in (found, found["reference"]):
        assert model["prefill_tokens_per_second"] == pytest.approx(10 / model["prefill_seconds"])
        assert model["decode_tokens_per_second"] == pytest.approx(1 / model["decode_seconds"])
        # The embedding is tied to the head and counts once.
        assert model["weight_bytes"] == 4 * sum(p.numel() for p in small.parameters()) + sum(
            b.nbytes for b in small.buffers()
        )
        assert model["decode_bytes_per_second"] == pytest.approx(
            model["token_bytes"] / model["decode_seconds"]
        )
        assert model["memory_bytes_per_second"] > 1e8
    # The reference's peak would include the model's.
    assert found["peak_bytes"] > 1e7 and found["reference"]["peak_bytes"] is None
    assert found["ratio"]["interleaved"] is True
    for ratio in (found["ratio"]["prefill"], found["ratio"]["decode"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert "decode, tokens/s (3 tokens)" in result.stdout and "ratio" in result.stdout
    assert "of the memory limit" in result.stdout


def test_a_token_reads_the_chosen_experts_and_one_row_of_the_embedding(small):
    # Two of four experts; the head is the embedding, read whole for the logits.
    from erniequant.evaluate.speed import bytes_of_a_token

    sizes = {name: p.nbytes for name, p in small.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert experts > 0
    # The correction biases lie in modules of their own, a few bytes that no forward call shows.
    expected = sum(sizes.values()) - experts / 2
    assert bytes_of_a_token(small) == pytest.approx(expected, abs=300)


def test_both_models_take_turns_if_they_fit(small, monkeypatch):
    module = importlib.import_module("erniequant.evaluate.speed")
    real, turns = module._once, []

    def once(model, *rest):
        turns.append(model)
        return real(model, *rest)

    monkeypatch.setattr(module, "_once", once)
    other = copy.deepcopy(small)
    options = {"prompt_tokens": 4, "new_tokens": 2, "repetitions": 2}
    found = module.compare_speed(lambda: small, lambda: other, **options)
    assert found.interleaved and turns == [small, other] + [small, other] * 2
    turns.clear()
    found = module.compare_speed(lambda: small, lambda: other, interleave=False, **options)
    assert not found.interleaved and turns == [small] * 3 + [other] * 3


def test_models_that_do_not_fit_together(small, tmp_path, monkeypatch):
    from erniequant_cli.loading import fit_together

    small.save_pretrained(tmp_path / "m")
    assert fit_together(str(tmp_path / "m"), str(tmp_path / "m"), "cpu")
    monkeypatch.setattr("erniequant.system.available_memory", lambda: 10_000)
    assert not fit_together(str(tmp_path / "m"), str(tmp_path / "m"), "cpu")
    assert fit_together(str(tmp_path / "m"), str(tmp_path / "nothing"), "cpu")


def test_speed_feeds_the_prompt_once_and_then_single_tokens(small, monkeypatch):
    from erniequant.evaluate import speed

    fed = []
    real = small.forward

    @functools.wraps(real)
    def recording(input_ids, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        fed.append((input_ids.shape[1], cache is not None))
        return real(input_ids, **kwargs)

    monkeypatch.setattr(small, "forward", recording)
    speed(small, prompt_tokens=5, new_tokens=2, repetitions=1)
    # The last pass counts the weights that a token reads.
    assert fed == [(5, False), (1, True), (1, True)] * 2 + [(1, False)]


def test_more_tokens_than_positions_are_refused(run, small, monkeypatch):
    monkeypatch.setattr("erniequant_cli.loading.load_model", lambda *_: (small, None))
    result = run("eval", "speed", "a", "--prompt", 60, "--new", 5)
    assert result.exit_code == 1 and "64 positions" in result.stderr


def test_the_first_repetition_and_the_prompt_do_not_count_as_decoding(small, monkeypatch):

    module = importlib.import_module("erniequant.evaluate.speed")
    seconds = iter([[100.0] * 3, [8.0, 1.0, 3.0], [10.0, 1.0, 5.0]])
    monkeypatch.setattr(module, "_once", lambda *_: next(seconds))
    result = module.speed(small, prompt_tokens=4, new_tokens=2, repetitions=2)
    assert (result.prefill_seconds, result.decode_seconds) == (9.0, 2.0)


@pytest.mark.parametrize("given, found", [(None, "passive"), ("active", "active")])
def test_threads_of_torch_do_not_spin_unless_told_to(given, found):
    # The policy is read when torch is loaded, so the command line sets it before.
    program = (
        "import sys, erniequant_cli.main, os; assert 'torch' not in sys.modules; "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == found
