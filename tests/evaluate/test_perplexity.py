"""Perplexity and divergence against closed forms and brute-force loops on tiny made-up models."""

import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from erniequant.data.token_hash import hash_token_ids
from erniequant.errors import ErnieQuantError
from erniequant.evaluate import perplexity
from erniequant.evaluate.scoring import ROWS_AT_ONCE, standard_error
from erniequant.evaluate.windows import Window, cut_windows, group_windows

VOCABULARY = 11


class LetterTokenizer:
    """One token per letter; says so when asked for special tokens, which the protocol forbids."""

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) % VOCABULARY for letter in text]
        return {"input_ids": [VOCABULARY - 1, *ids] if add_special_tokens else ids}


class Bigram(nn.Module):
    """Next-token logits that depend on the current token and on how far into the window it
    stands."""

    def __init__(self, seed, positions=64, vocabulary=VOCABULARY):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(2 * torch.randn(vocabulary, vocabulary, generator=generator))
        self.position = nn.Parameter(torch.randn(positions, vocabulary, generator=generator))

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        index = torch.arange(input_ids.shape[1]) % len(self.position)
        return SimpleNamespace(logits=self.table[input_ids] + self.position[index])


class Uniform(nn.Module):
    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


def letters(n, seed=0):
    generator = np.random.default_rng(seed)
    return "".join(chr(97 + k) for k in generator.integers(0, 26, n))


def brute_force(model, text, context, stride):
    """Token by token, in plain Python: distribution at each scored token and the token itself."""
    ids = LetterTokenizer()(text, add_special_tokens=False)["input_ids"]
    scored = {}
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + context]
        for offset in range(1, len(window)):
            if begin + offset in scored:
                continue
            row = model.table[window[offset - 1]] + model.position[(offset - 1) % 64]
            p = [math.exp(v) for v in row.tolist()]
            scored[begin + offset] = [v / sum(p) for v in p]
        if begin + context >= len(ids):
            break
    return [(ids[k], scored[k]) for k in sorted(scored)]


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = perplexity(Uniform(), LetterTokenizer(), letters(50), context=16)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.stderr == pytest.approx(0, abs=1e-6)


# 2: one scored token. 16: exactly one window. 17: a last window of one token, which scores
# nothing. 18: a last window that scores one. 47: three windows, the last short. stride 5, 16:
# overlap that does and does not divide the context; stride 1: every token in its own window.
@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 47])
@pytest.mark.parametrize("stride", [None, 1, 5, 8, 16])
def test_matches_brute_force(length, stride):
    model, text = Bigram(1), letters(length)
    result = perplexity(model, LetterTokenizer(), text, context=16, stride=stride)
    expected = brute_force(model, text, 16, stride or 16)
    nll = [-math.log(p[token]) for token, p in expected]
    assert result.tokens == len(nll)
    assert result.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_distance_to_a_reference_matches_brute_force():
    model, reference, text = Bigram(1), Bigram(2), letters(47)
    result = perplexity(model, LetterTokenizer(), text, reference=reference, context=16)
    ours, theirs = brute_force(model, text, 16, 16), brute_force(reference, text, 16, 16)
    kl, agree, difference = [], [], []
    for (token, p), (_, q) in zip(ours, theirs, strict=True):
        kl.append(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
        agree.append(p.index(max(p)) == q.index(max(q)))
        difference.append(math.log(q[token]) - math.log(p[token]))
    found = result.reference
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl_p90 == pytest.approx(np.quantile(kl, 0.9), rel=1e-4)
    assert found.top1_agreement == pytest.approx(np.mean(agree))
    assert found.ratio == pytest.approx(math.exp(np.mean(difference)), rel=1e-5)
    assert found.ratio == pytest.approx(result.perplexity / found.perplexity, rel=1e-9)


def test_chunks_of_rows_do_not_show():
    # One window longer than two chunks, with a remainder.
    text = letters(2 * ROWS_AT_ONCE + 37)
    result = perplexity(Bigram(1), LetterTokenizer(), text, reference=Bigram(2), context=4096)
    nll = [-math.log(p[token]) for token, p in brute_force(Bigram(1), text, 4096, 4096)]
    assert (result.windows, result.tokens, result.context) == (1, len(text) - 1, len(text))
    assert result.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)


def test_identical_reference_is_no_distance_at_all():
    model = Bigram(3)
    found = perplexity(model, LetterTokenizer(), letters(90), reference=model, context=16).reference
    assert (found.ratio, found.ratio_stderr) == (1.0, 0.0)
    assert (found.kl_mean, found.kl_p90, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_divergence_is_taken_from_the_reference():
    # KL(q || p) with q sharp and p flat is about log(vocabulary); the other way round it is far
    # larger.
    sharp, flat = Bigram(4), Uniform()
    with torch.no_grad():
        sharp.table.mul_(50)
    forward = perplexity(flat, LetterTokenizer(), letters(60), reference=sharp, context=16)
    backward = perplexity(sharp, LetterTokenizer(), letters(60), reference=flat, context=16)
    assert forward.reference.kl_mean < math.log(VOCABULARY) + 1e-6
    assert backward.reference.kl_mean > 5 * math.log(VOCABULARY)


def test_error_is_clustered_by_window():
    # Values equal within a window carry one observation per window, not one per token.
    means = np.array([1.0, 3.0, 2.0, 6.0])
    values, cluster = np.repeat(means, 50), np.repeat(np.arange(4), 50)
    assert standard_error(values, cluster) == pytest.approx(means.std(ddof=1) / math.sqrt(4))
    alone = standard_error(values, np.zeros(200, dtype=int))
    assert alone == pytest.approx(values.std(ddof=1) / math.sqrt(200))


def test_error_covers_the_truth_about_as_often_as_it_claims():
    # 68 % of one-sigma intervals hold the true mean of data that is correlated within its windows.
    rng = np.random.default_rng(0)
    cluster, hits = np.repeat(np.arange(40), 10), 0
    for _ in range(400):
        values = np.repeat(rng.normal(size=40), 10) + rng.normal(size=400)
        hits += abs(values.mean()) < standard_error(values, cluster)
    assert 0.60 < hits / 400 < 0.75


def test_json_has_the_names_others_rely_on():
    text = letters(40)
    plain = perplexity(Bigram(1), LetterTokenizer(), text, context=16).to_dict()
    assert "reference" not in plain
    both = perplexity(Bigram(1), LetterTokenizer(), text, reference=Bigram(2), context=16).to_dict()
    assert set(both) >= {
        *("perplexity", "stderr", "tokens", "context", "stride", "bos", "reference"),
        *("text_sha256", "token_ids_sha256"),
    }
    assert set(both["reference"]) == {
        *("perplexity", "ratio", "ratio_stderr", "kl_mean", "kl_p90", "top1_agreement"),
    }
    assert both["bos"] is False
    assert both["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(json.dumps(both)) == both


def test_token_hash_is_of_little_endian_32_bit_ids():
    expected = hashlib.sha256(bytes([1, 0, 0, 0, 0, 1, 0, 0])).hexdigest()
    assert hash_token_ids(torch.tensor([1, 256])) == expected


def test_tokens_limits_the_text_and_its_hash():
    text = letters(60)
    cut = perplexity(Bigram(1), LetterTokenizer(), text, context=16, tokens=20)
    short = perplexity(Bigram(1), LetterTokenizer(), text[:20], context=16)
    assert cut.perplexity == short.perplexity
    assert cut.token_ids_sha256 == short.token_ids_sha256
    assert cut.text_sha256 != short.text_sha256


def test_context_follows_the_model_unless_asked_for():
    model = Bigram(1)
    model.config = SimpleNamespace(max_position_embeddings=32)
    text = letters(100)
    assert perplexity(model, LetterTokenizer(), text).context == 32
    assert perplexity(model, LetterTokenizer(), text, context=8).context == 8
    with pytest.raises(ErnieQuantError, match="32 positions"):
        perplexity(model, LetterTokenizer(), text, context=33)


@pytest.mark.parametrize(
    ("length", "options", "reason"),
    [
        (1, {}, "nothing can be scored"),
        (0, {}, "nothing can be scored"),
        (20, {"tokens": 1}, "nothing can be scored"),
        (20, {"context": 1}, "scores no token"),
        (20, {"context": 8, "stride": 9}, "stride 9"),
        (5, {"context": 8, "stride": 9}, "stride 9"),
        (20, {"context": 8, "stride": 0}, "stride 0"),
    ],
)
def test_refuses_what_cannot_be_scored(length, options, reason):
    with pytest.raises(ErnieQuantError, match=reason):
        perplexity(Bigram(1), LetterTokenizer(), letters(length), **options)


def test_refuses_a_reference_with_another_vocabulary():
    other = Bigram(1, vocabulary=VOCABULARY + 1)
    with pytest.raises(ErnieQuantError, match="11 words and the reference 12"):
        perplexity(Bigram(1), LetterTokenizer(), letters(20), reference=other)


def test_refuses_logits_that_are_not_finite():
    broken = Bigram(1)
    with torch.no_grad():
        broken.table[3, 3] = torch.nan
    with pytest.raises(ErnieQuantError, match="not finite"):
        perplexity(broken, LetterTokenizer(), letters(200), context=16)


def test_windows_of_a_known_case():
    assert cut_windows(10, 4, 4) == [Window(0, 4, 1), Window(4, 8, 5), Window(8, 10, 9)]
    assert cut_windows(9, 4, 4) == [Window(0, 4, 1), Window(4, 8, 5)]
    assert cut_windows(7, 4, 2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 7, 6)]


def test_windows_share_a_pass_only_with_their_length():
    windows = cut_windows(43, 10, 10)
    assert [len(group) for group in group_windows(windows, 25)] == [2, 2, 1]
    assert [len(group) for group in group_windows(windows, 5)] == [1, 1, 1, 1, 1]
