"""The pure parts of the benchmark on a real model, against closed forms and brute force."""

import argparse
import json
import math
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.real_model import evaluation, routers, runs, source, texts
from benchmarks.tiny_models import ablation


def on_a_grid(rows: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as Q4_1 has it and the step at each weight."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (rows, blocks, 32), generator=generator)
    codes[:, :, 5], codes[:, :, 20] = 15, 0
    step = torch.rand(rows, blocks, 1, generator=generator) + 0.01
    least = torch.randn(rows, blocks, 1, generator=generator)
    return (least + step * codes).flatten(1), step.expand(-1, -1, 32).flatten(1)


def test_noise_is_as_wide_as_a_step_of_each_block() -> None:
    # Three blocks in a row: neighbours have other steps. 200 rows: 19,200 draws.
    weight, step = on_a_grid(200, 3)
    torch.testing.assert_close(source.steps(weight), step)
    state = {"a": weight, "b": weight, "norm": torch.ones(96), "c": torch.full((1, 32), 2.5)}
    noised = source.blurred(state, {"a", "b", "c"}, seed=0)
    noise = (noised["a"] - weight) / step
    assert noise.abs().max() <= 0.5 + 1e-4
    # Uniform: mean 0, variance 1/12, both within four standard errors.
    count = noise.numel()
    assert abs(noise.mean()) < 4 * math.sqrt(1 / 12 / count)
    assert abs(noise.square().mean() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    assert noised["norm"] is state["norm"] and torch.equal(state["a"], state["b"])
    assert not torch.equal(noised["a"], noised["b"])
    # A block of equal weights has steps of no width.
    assert torch.equal(noised["c"], state["c"])


def test_noise_is_seeded() -> None:
    state = {"a": on_a_grid(5, 2)[0]}
    one, again, other = (source.blurred(state, {"a"}, seed)["a"] for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    with pytest.raises(KeyError):
        source.blurred(state, {"a", "missing"}, 3)


def test_tensors_on_the_grid_by_transformers_names(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"blk.12.attn_q.weight": "Q4_1", "blk.0.attn_norm.weight": "F32",
             "token_embd.weight": "Q8_0", "blk.0.ffn_down.weight": "Q4_1"}  # fmt: skip
    tensors = [SimpleNamespace(name=name, tensor_type=kind) for name, kind in kinds.items()]
    gguf = SimpleNamespace(
        GGMLQuantizationType=SimpleNamespace(Q4_1="Q4_1"),
        GGUFReader=lambda file: SimpleNamespace(tensors=tensors),
    )
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    assert source.on_grid(Path("x")) == {
        "model.layers.12.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    }  # fmt: skip


def test_divergence_in_closed_form() -> None:
    p, q = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    expected = torch.tensor([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0])
    torch.testing.assert_close(evaluation.divergence(p.log(), q.log()), expected)
    # What float16 leaves off the sum of probabilities does not count.
    torch.testing.assert_close(evaluation.divergence(p.log() + 0.01, q.log()), expected)


def test_clustered_error() -> None:
    # Windows of one value: the textbook error. Equal values in each window: that of four values.
    values = torch.tensor([1.0, 2.0, 4.0, 9.0]).double()
    expected = (4.0, float(values.std() / 2))
    assert evaluation.clustered(values, [1] * 4) == pytest.approx(expected)
    assert evaluation.clustered(values.repeat_interleave(7), [7] * 4) == pytest.approx(expected)
    # A short last window. Mean 3; sums of deviations 3 - 9 = -6 and 6.
    values = torch.tensor([0.0, 1.0, 2.0, 9.0]).double()
    assert evaluation.clustered(values, [3, 1]) == pytest.approx((3.0, math.sqrt(2 * 72) / 4))
    assert math.isnan(evaluation.clustered(values, [4])[1])


class Table:
    """A model whose logits depend on the last token only."""

    def __init__(self, seed: int) -> None:
        self.rows = 3 * torch.randn(7, 7, generator=torch.Generator().manual_seed(seed))

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.rows[ids])


def test_a_comparison_is_that_of_whole_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two windows, whose 599 losses are no multiple of 256, then one of two tokens and, cut shorter,
    # one of a single token, which has no loss.
    (tmp_path / "config.json").write_text("{}")
    one, two = Table(1), Table(2)
    loads = []
    monkeypatch.setattr(evaluation, "load", lambda folder: loads.append(folder) or one)
    ids = torch.randint(0, 7, (1202,), generator=torch.Generator().manual_seed(3))
    for given, count in ((ids, 3), (ids[:1201], 2)):
        windows = texts.Text("en", given, "", context=600).windows
        assert len(windows) == count
        original = evaluation.original(tmp_path, windows, tmp_path / "cache")
        again = evaluation.original(tmp_path, windows, tmp_path / "cache")
        assert torch.equal(again.loss, original.loss)
        last, next_ = (torch.cat([w[s] for w in windows]) for s in (slice(-1), slice(1, None)))
        p, q = (table.rows[last].double().log_softmax(1) for table in (one, two))
        losses = [-logs.gather(1, next_[:, None]).mean() for logs in (p, q)]
        figures = evaluation.compare(two, windows, original)
        assert figures.tokens == len(last)
        assert original.perplexity == pytest.approx(losses[0].exp().item(), rel=1e-5)
        assert figures.perplexity == pytest.approx(losses[1].exp().item(), rel=1e-5)
        assert figures.ratio == pytest.approx((losses[1] - losses[0]).exp().item(), rel=1e-5)
        assert figures.kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), abs=1e-4)
        agreement = (p.argmax(1) == q.argmax(1)).double().mean()
        assert figures.top == pytest.approx(agreement.item())
        same = evaluation.compare(one, windows, original)
        assert (same.ratio, same.top) == (1, 1) and abs(same.kl) < 1e-5
    assert len(loads) == 2


def test_overlap_counts_ngrams() -> None:
    ids, others = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([9, 3, 4, 5, 2, 3, 6])
    # 1 2 3, 2 3 4, 3 4 5, 4 5 6: only 3 4 5 is in the other text.
    assert texts.overlap(ids, others, 3) == 1 / 4
    assert texts.overlap(ids, others, 1) == 5 / 6
    assert texts.overlap(ids, others[:2], 3) == 0 == texts.overlap(ids[:2], ids, 3)
    # Ids are longer than a byte.
    assert texts.overlap(torch.tensor([1]), torch.tensor([257]), 1) == 0


def test_other_code_is_refused(tmp_path: Path) -> None:
    for requirement, member in texts.CODE.items():
        name, version = requirement.split("==")
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, "x = 1\n")
    with pytest.raises(SystemExit, match="not the published ones"):
        texts.code(tmp_path)


def skewed(tokens: int, hidden: int) -> torch.Tensor:
    """Inputs with a mean, unequal variances and long tails."""
    generator = torch.Generator().manual_seed(4)
    size = torch.logspace(0, 1, hidden)
    draws = torch.rand(tokens, hidden, generator=generator).log().neg()
    turn = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    return (draws * size + 0.5) @ turn


def test_routers_take_one_of_each_pair_and_the_stated_shares() -> None:
    tokens = skewed(3000, 24)
    router = routers.paired(tokens, (0.99, 0.7, 0.8, 0.9))
    experts, weights = routers.chosen(router, tokens)
    assert torch.equal((experts // 2).sort(1).values, torch.arange(4).expand(3000, 4))
    assert (weights - 0.25).abs().max() < 4e-4
    popular = [(experts == 2 * pair).any(1).double().mean().item() for pair in range(4)]
    assert popular == pytest.approx([0.99, 0.7, 0.8, 0.9], abs=1e-3)
    # Rows point along the directions of greatest variance, the rare copy's to the long tail.
    rows = router.weight[1::2]
    centred = tokens - tokens.mean(0)
    variances = (centred @ (rows / rows.norm(dim=1, keepdim=True)).T).var(0)
    largest = torch.linalg.eigvalsh(centred.T.cov()).flip(0)[:4]
    torch.testing.assert_close(variances, largest, rtol=1e-3, atol=0)
    assert ((centred @ rows.T) ** 3).mean(0).min() > 0


def test_a_mixture_of_copies_computes_the_same_in_stock_transformers() -> None:
    from transformers import Ernie4_5_MoeConfig
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock

    def block(experts: int) -> Any:
        config = Ernie4_5_MoeConfig(
            hidden_size=24, moe_intermediate_size=20, moe_num_experts=experts, moe_k=4,
            moe_num_shared_experts=0, experts_implementation="eager",
        )  # fmt: skip
        return Ernie4_5_MoeSparseMoeBlock(config)

    tokens = skewed(500, 24)
    router = routers.paired(tokens, routers.SHARES)
    dense, sparse = block(4), block(8)
    with torch.no_grad():
        for name, values in dense.experts.named_parameters():
            values.normal_(generator=torch.Generator().manual_seed(5))
            getattr(sparse.experts, name).copy_(values.repeat_interleave(2, 0))
        dense.gate.weight.zero_()
        sparse.gate.weight.copy_(router.weight)
        sparse.gate.moe_statics.e_score_correction_bias.copy_(router.bias)
        expected, found = (moe(tokens[None]) for moe in (dense, sparse))
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_windows_spread_over_a_text() -> None:
    windows = routers.spread(torch.arange(100), windows=3, length=10)
    assert windows[:, 0].tolist() == [0, 45, 90] and windows[:, -1].tolist() == [9, 54, 99]


def test_settings_given_through() -> None:
    found = runs.settings("device=cpu,max_tp=1,no_calib=True,work_dir=x=y,max_memory=")
    assert found == {
        "device": "cpu", "max_tp": 1, "no_calib": True, "work_dir": "x=y", "max_memory": ""
    }  # fmt: skip
    assert runs.settings("") == {}
    assert runs.merged([{"a": 1, "b": 2}, {"a": 3}]) == {"a": 3, "b": 2}
    wrong = {"max_tp": "not KEY=VALUE", "bits=2": "its own option", "colour=red": "no such option"}
    for text, message in wrong.items():
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            runs.settings(text)


def test_rows_and_their_mean() -> None:
    def entry(seed: int, ratio: float, kl: float) -> dict[str, Any]:
        figures = {"ratio": ratio, "ratio_error": 0.01, "kl": kl, "kl_error": 0.02, "top": 0.5}
        return {"model": "tiny", "bits": 2, "seed": seed, "settings": {"max_tp": 1},
                "texts": {"zh": figures}, "quantize_seconds": 10.0 * seed}  # fmt: skip

    entries = [entry(1, 2.0, 0.25), entry(2, 8.0, 0.75)]
    assert runs.row(entries[0]) == (
        "| tiny | 2 | 1 | max_tp=1 | 2.0000 ± 0.0100 | 0.2500 ± 0.0200 | 50.0% | 10 |"
    )
    # Geometric mean 4; the standard deviations of log 2, log 8 and of 1/4, 3/4: log 2 and 1/2
    # times the root of 2.
    spread, root = 4 * math.log(2) * math.sqrt(2), 0.5 / math.sqrt(2)
    assert runs.mean_row(entries) == (
        f"| tiny | 2 | mean of 2 | max_tp=1 | 4.0000 ± {spread:.4f} | 0.5000 ± {root:.4f} "
        "| 50.0% | 15 |"
    )
    columns = {
        line.count("|") for line in [*runs.heading(["zh"]).split("\n"), runs.row(entries[0])]
    }
    assert columns == {9}


def test_the_tiny_model_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "ablation", "--work", str(tmp_path), "--bits", "2", "--effort", "fast", "--texts", "zh",
        "--samples", "2", "--tokens", "1200", "--variants", "max_tp=1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    ablation.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("zh: 1,200 tokens") and "0.00%" in lines[0]
    assert lines[-1].startswith("| tiny_model | 2 | 0 | max_tp=1 | 1.")
    result = json.loads((tmp_path / "results.jsonl").read_text())
    figures = result["texts"]["zh"]
    # Three windows of 512, the last one cut: each has a token without a loss.
    assert figures["tokens"] == 1200 - 3 and 0 < figures["kl"] < 1
    assert figures["ratio"] == pytest.approx(figures["perplexity"] / figures["original_perplexity"])
    assert not list((tmp_path / "plain").iterdir())


def test_an_overlap_stops_the_program(tmp_path: Path) -> None:
    ids = torch.arange(40)
    text = texts.Text("en", ids, "")
    with pytest.raises(SystemExit, match="en overlaps"):
        runs.measured(tmp_path, tmp_path, [text], torch.cat([ids[7:], ids]))
