"""What Quest, streaming and the best selection there could be read."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    PROMPT,
    SCALE,
    TREE,
    case,
    engine_of,
)
from springtide import SpringtideError
from springtide.attention.baselines import Oracle, Quest, Streaming, page_bounds
from springtide.attention.policy import Layer
from springtide.attention.tidal import Tidal
from springtide.rows.segment import PREFIX


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_the_oracle_selects_by_scores_and_keeps_only_itself(seed, budget):
    q, segment = case(seed, parents=TREE)
    by_scores = Tidal(budget=budget, sinks=0, recent=0, heads="kv", pool="mean").choose(Layer(0, SCALE), q, segment)
    assert torch.equal(Oracle(budget=budget).choose(Layer(0, SCALE), q, segment), by_scores)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 16))
def test_a_pages_bound_is_above_every_product_in_it(seed, length, page):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(KV_HEADS, length, HEAD_DIM, generator=generator, dtype=torch.float64)
    q = torch.randn(HEAD_DIM, generator=generator, dtype=torch.float64)
    low, high = page_bounds(keys, page)
    assert low.shape == high.shape == (KV_HEADS, -(-length // page), HEAD_DIM)
    for number, start in enumerate(range(0, length, page)):
        part = keys[:, start : start + page]
        assert torch.equal(low[:, number], part.amin(1)) and torch.equal(high[:, number], part.amax(1))
    bound = torch.maximum(q * low, q * high).sum(-1)
    for slot in range(length):
        assert (keys[:, slot] @ q <= bound[:, slot // page] + 1e-12).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 4), st.sampled_from(["max", "mean"]))
def test_quest_reads_the_pages_with_the_highest_bounds_and_the_newest(seed, page, pages, pool):
    q, segment = case(seed, prefix=27, parents=(PREFIX,), dtype=torch.float64)
    keys, _ = segment.cache.read(0, 0, segment.length)
    low, high = page_bounds(keys, page)
    chosen = Quest(budget=page * pages + page - 1, page=page, pool=pool).choose(Layer(0, SCALE), q, segment)
    last = 27 // page
    for kv_head in range(KV_HEADS):
        group = q[0, kv_head * GROUP : (kv_head + 1) * GROUP, None]
        bound = torch.maximum(group * low[kv_head], group * high[kv_head]).sum(-1)
        bound = bound.amax(0) if pool == "max" else bound.softmax(-1).mean(0)
        bound[last] = torch.inf
        best = bound.topk(min(pages, last + 1)).indices.sort().values.tolist()
        assert chosen[0, kv_head].tolist() == [p * page + i for p in best for i in range(page)]


def test_quest_keeps_each_rows_own_page_in_a_tree_that_spans_pages():
    q, segment = case(1, prefix=11, parents=(PREFIX, 0, 1, 2, 3))
    chosen = Quest(budget=4, page=4).choose(Layer(0, SCALE), q, segment)
    for row in range(5):
        assert (chosen[row] == 11 + row).any(-1).all()


@pytest.mark.parametrize(("budget", "sinks"), [(9, 3), (4, 4), (1, 4), (6, 0)])
def test_streaming_reads_the_sinks_and_the_newest_alone(budget, sinks):
    engine = engine_of(Streaming(budget=budget, sinks=sinks))
    read = {}

    def meter(layer, q, segment, index, mask, _):
        read.setdefault(layer.index, []).append(
            [set(i[m].tolist()) for i, m in zip(index[:, 1], mask[:, 1], strict=True)]
        )

    list(engine.predictions(PROMPT, 30, meter=meter))
    recent = max(1, budget - sinks)
    kept_sinks = min(sinks, budget - recent)
    expected = [{*range(kept_sinks), *range(at - recent + 1, at + 1)} for at in range(30, 39)]
    assert read == {layer: [expected] for layer in range(6)}


@pytest.mark.parametrize("policy", ["quest:skip=-1", "oracle:skip=-2", "streaming:sinks=-1"])
def test_options_below_zero_are_refused(policy):
    name, option, value = re.split("[:=]", policy)
    with pytest.raises(SpringtideError, match=f"{name}: {option} is {value}, but it must be at least 0"):
        engine_of(policy)


@pytest.mark.parametrize("policy", [Oracle(budget=1.5), Streaming(sinks="4"), Quest(page=None), Tidal(recent=2.5)])
def test_options_that_are_no_whole_numbers_are_refused(policy):
    with pytest.raises(SpringtideError, match=f"{policy.name}: .* is .*, but it must be a whole number"):
        engine_of(policy)
