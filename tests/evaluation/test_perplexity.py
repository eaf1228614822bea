"""Perplexity is the exponential of the mean cross entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide import SpringtideError
from springtide.attention import Tidal
from springtide.engine.engine import Engine
from springtide.evaluation.perplexity import Perplexity, perplexity
from tiny import tiny

LAYERS = {"full": (0,), "select": 1, "reselect": (3,)}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return springtide.load(tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())


@pytest.fixture(scope="module")
def text() -> list[int]:
    return tokenizer().encode(BOOK)[:700]


def measured(*args) -> list[Perplexity]:
    *_, rows = perplexity(*args)
    return rows()


@pytest.mark.parametrize(("length", "windows"), [(200, 3), (201, 1), (700, 1)])
def test_dense_equals_transformers(engine, text, length, windows):
    losses = []
    for window in range(windows):
        start = round(window * (len(text) - length) / max(1, windows - 1))
        ids = torch.tensor([text[start : start + length]])
        with torch.no_grad():
            logits = engine.stack.model(ids).logits[0]
        half = length // 2
        losses.append(cross_entropy(logits[half - 1 : -1], ids[0, half:], reduction="none"))
    (row,) = measured(engine, text, [engine.policy], length, windows)
    assert row.perplexity == pytest.approx(math.exp(torch.cat(losses).double().mean()), rel=1e-4)
    assert row.tokens == windows * (length - length // 2)
    assert row.ratio_to_dense == 1.0


def test_ratio_to_dense(engine, text):
    tight, wide = (Tidal(budget=budget, **LAYERS) for budget in (16, 600))
    dense, sparse, covering = measured(engine, text, [engine.policy, tight, wide], 300, 2)
    assert sparse.ratio_to_dense == pytest.approx(sparse.perplexity / dense.perplexity)
    assert sparse.perplexity != pytest.approx(dense.perplexity, rel=1e-4)
    assert covering.ratio_to_dense == pytest.approx(1.0, rel=1e-5)
    assert (sparse.policy, sparse.budget) == ("tidal", 16)
    (alone,) = measured(engine, text, [tight], 300, 2)
    assert alone.ratio_to_dense is alone.kl_to_dense is alone.kl_curve is None
    assert alone.perplexity == pytest.approx(sparse.perplexity)


def test_rows_of_what_is_done_so_far(engine, text):
    policies = [engine.policy, Tidal(budget=16, **LAYERS)]
    complete = measured(engine, text, policies, 300, 1)
    for done, rows in enumerate(perplexity(engine, text, policies, 300, 3), start=1):
        if done == 7:
            assert [row.tokens for row in rows()] == [7, 7]
            assert [at for at, _ in rows()[1].kl_curve] == [7]
            assert rows()[1].kl_curve[0][1] == pytest.approx(rows()[1].kl_to_dense)
        if done == 150:
            assert rows() == complete
        if done == 160:  # the second window has begun
            dense, sparse = rows()
            assert (sparse.tokens, [at for at, _ in sparse.kl_curve]) == (160, [128, 150])
            shares = [(128 + 10) / 160, 22 / 160]
            kl = sum(share * kl for share, (_, kl) in zip(shares, sparse.kl_curve, strict=True))
            assert sparse.kl_to_dense == pytest.approx(kl)
            assert dense.kl_to_dense == pytest.approx(0, abs=1e-6)
            return


@pytest.mark.parametrize(
    ("length", "message"), [(1, "leaves nothing"), (701, "The text has 700 tokens"), (1024, "context holds 1024")]
)
def test_lengths_that_cannot_be(engine, text, length, message):
    with pytest.raises(SpringtideError, match=message):
        measured(engine, text, [engine.policy], length, 1)


def test_divergence_from_dense_along_the_text(engine, text):
    tight = Tidal(budget=16, **LAYERS)
    dense, sparse = measured(engine, text, [engine.policy, tight], 500, 2)
    found = []
    for start in (0, 200):
        window = text[start : start + 500]
        truth, other = (
            torch.cat(list(engine.using(policy).predictions(window, 250))).log_softmax(-1)
            for policy in (engine.policy, tight)
        )
        found.append(kl_div(other, truth, log_target=True, reduction="none").sum(-1))
    expected = torch.stack(found).mean(0)
    assert dense.kl_to_dense == pytest.approx(0, abs=1e-6)
    assert sparse.kl_to_dense == pytest.approx(expected.mean().item(), rel=1e-3)
    assert [at for at, _ in sparse.kl_curve] == [128, 250]
    assert sparse.kl_curve[1][1] == pytest.approx(expected[128:].mean().item(), rel=1e-3)
