"""Recall of selections whose recall is known."""

from __future__ import annotations

import pytest
import torch

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide import SpringtideError
from springtide.attention import Oracle, Streaming, Tidal
from springtide.attention.policy import Layer, Policy
from springtide.engine.engine import Engine
from springtide.evaluation.needle import Haystack
from springtide.evaluation.recall import LayerRecall, Meter, recall
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.segment import Segment
from tiny import tiny

LENGTH = 400


@pytest.fixture(scope="module")
def engine() -> Engine:
    return springtide.load(tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(tokenizer(), BOOK)


def measured(engine, haystack, policies, length=LENGTH, trials=1) -> list[LayerRecall]:
    steps = list(recall(engine, haystack, policies, length, trials))
    assert len(steps) == trials
    return steps[-1]()


def test_rows_of_what_is_done_so_far(engine, haystack):
    policies = [Oracle(budget=64, skip=1), Streaming(budget=64)]
    for trials, rows in enumerate(recall(engine, haystack, policies, LENGTH, 2), start=1):
        assert rows() == measured(engine, haystack, policies, trials=trials)


def test_the_oracle_reads_the_true_top_tokens(engine, haystack):
    rows = measured(engine, haystack, [Oracle(budget=64, skip=1)], trials=2)
    assert [(row.policy, row.budget, row.layer) for row in rows] == [("oracle", 64, layer) for layer in (1, 2, 3)]
    assert all(row.top_k > 0.98 for row in rows)
    assert all(0 < row.mass <= 1 + 1e-5 for row in rows)


def test_nothing_holds_more_than_the_oracle_and_more_budget_holds_more(engine, haystack):
    layers = {"full": (0,), "select": 1, "reselect": ()}
    policies = [Oracle(budget=64, skip=2), Tidal(budget=64, **layers), Streaming(budget=64), Streaming(budget=300)]
    mass = {(row.policy, row.budget, row.layer): row.mass for row in measured(engine, haystack, policies)}
    for layer in (2, 3):
        best = mass["oracle", 64, layer]
        assert mass["tidal", 64, layer] < best
        assert mass["streaming", 64, layer] < best
        assert mass["streaming", 64, layer] < mass["streaming", 300, layer] <= 1 + 1e-5


def test_every_head_is_measured_by_itself():
    """Two rows, two KV heads that share four query heads: logits are keys, times 1, 2 for the queries of a head."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.5], [3.0, 0.0, 1.0, 2.0]])  # [H_kv, L]
    cache = Cache(Pool(1))
    cache.write(0, 0, logits[..., None], logits[..., None])
    segment = Segment.chain(cache, 2, [7, 7], "decode", Policy())
    q = torch.tensor([1.0, 2.0, 1.0, 2.0]).expand(2, 4)[..., None]
    index = torch.tensor([[2, 0], [1, 2]]).expand(2, 2, 2)  # head 0 reads slots 2 and 0, head 1 slots 1 and 2
    meter = Meter()
    for _ in range(2):
        meter(Layer(0, scale=1.0), q, segment, index, torch.ones_like(index, dtype=torch.bool), ())
    expected = []
    for head, slots in ((0, [2, 0]), (1, [1, 2])):
        seen = [logits[head, : 3 + row] * factor for row in (0, 1) for factor in (1, 2)]
        expected.append(sum(row.softmax(-1)[slots].sum().item() for row in seen) / 4)
    assert meter.rows == {0: 4}
    assert (meter.mass[0] / 4).tolist() == pytest.approx(expected)


def test_a_layer_has_the_mass_of_each_head_and_the_worst(engine, haystack):
    rows = measured(
        engine, haystack, [Tidal(budget=64, heads="kv", full=(0,), select=1, reselect=()), Streaming(budget=64)]
    )
    assert rows
    for row in rows:
        assert len(row.mass_by_head) == 2
        assert row.mass == pytest.approx(sum(row.mass_by_head) / 2)
        assert row.worst_head_mass == min(row.mass_by_head) < max(row.mass_by_head)


def test_layers_that_stay_dense_have_no_rows(engine, haystack):
    rows = measured(engine, haystack, [engine.policy, Tidal(budget=64, full=(0, 2), select=1, reselect=())])
    assert [(row.policy, row.layer) for row in rows] == [("tidal", 3)]


def test_a_policy_whose_budget_covers_the_context_has_no_rows(engine, haystack):
    rows = measured(engine, haystack, [Streaming(budget=900), Streaming(budget=32)])
    assert {row.budget for row in rows} == {32}


@pytest.mark.parametrize("policy", ["dense", "streaming:budget=900"])
def test_nothing_to_measure_is_an_error(engine, haystack, policy):
    with pytest.raises(SpringtideError, match="Every policy reads the whole context of 400 tokens"):
        measured(engine, haystack, [engine.resolve(policy)])


@pytest.mark.parametrize(("length", "message"), [(50, "too short for 5 facts"), (1000, "context holds 1024")])
def test_lengths_that_cannot_be(engine, haystack, length, message):
    with pytest.raises(SpringtideError, match=message):
        measured(engine, haystack, [Streaming(budget=32)], length)
