"""What sparse policies share: budgets that grow, layers that keep their window, bytes that are counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending import (
    DEEP,
    GROWING,
    HEADS,
    LAYERS,
    LONG,
    MAPPED,
    PROMPT,
    SCALE,
    TIDAL,
    cached,
    case,
    engine_of,
    rows_after,
)
from springtide.attention import parse_policy
from springtide.attention.baselines import Quest, Streaming
from springtide.attention.policy import STEP, Layer, Policy, dense, read
from springtide.attention.tidal import Tidal
from springtide.errors import SpringtideError
from springtide.options import Share
from stepping import holding

# A budget that is a share of the context


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_a_share_is_rounded_up_and_grows_by_steps(length, tenths):
    percent = tenths / 10
    budget = Tidal(budget=Share(percent)).budget_at(length)
    step = -(-length // STEP) * STEP
    assert budget == -(-(tenths * step) // 1000)
    policy = Tidal(budget=Share(percent), full=(0,), select=1, reselect=(), means=0)
    ahead = policy.headroom(holding(length))
    grown = [policy.budget_at(length + more + 1) for more in range(ahead + 1)]
    assert 1 <= ahead <= STEP and len(set(grown[:-1])) == 1
    held = length + ahead == grown[0]  # no more are covered by the budget
    assert percent < 5 or held or grown[-1] > grown[0]
    fixed = Tidal(budget=9, means=0).headroom(holding(length))
    assert fixed == (9 - length if length < 9 else None)


@pytest.mark.parametrize(("context", "budget"), [(63, 20), (64, 39), (127, 39), (128, 58)])
def test_the_budget_is_that_of_the_tokens_there_are(context, budget):
    """With the one that is decoded: 30% of 64, 128 and 192."""
    engine, read = engine_of(f"{GROWING},means=0"), []
    list(engine.predictions(LONG[: context + 2], context, meter=lambda *about: read.append(about[3].shape[-1])))
    assert set(read) == {budget}


@pytest.mark.parametrize("name", ["tidal", "oracle", "streaming", "quest"])
@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("0%", "budget is 0%, but a share must be above 0% and at most 100%"),
        ("120%", "budget is 120%, but a share must be above 0% and at most 100%"),
        ("-3%", "budget is -3%, but a share"),
        ("x%", "budget is 'x%', but it must be a whole number, or a share such as 5%"),
        ("nan%", "budget is 'nan%', but it must be a whole number, or a share"),
        ("%", "budget is '%', but it must be a whole number, or a share"),
        ("5%%", "budget is '5%%', but it must be a whole number, or a share"),
        ("0.5", "budget is '0.5', but it must be a whole number, or a share"),
    ],
)
def test_shares_that_are_none(name, share, message):
    layers = f",{LAYERS}" * (name == "tidal")
    with pytest.raises(SpringtideError, match=f"{name}: {message}") as caught:
        engine_of(f"{name}:budget={share}{layers}")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_shares_in_text():
    policy = parse_policy("tidal:budget=2.5%,recent=10%")
    assert (policy.budget, policy.recent) == (Share(2.5), Share(10))
    assert (policy.named_budget, parse_policy("quest:budget=32").named_budget, Policy().named_budget) == (
        "2.5%",
        32,
        None,
    )
    assert parse_policy("tidal", Share(7)).budget == Share(7)
    assert Tidal().recent == Share(25)


# Layers with a sliding window


@pytest.mark.parametrize(
    "policy", ["oracle:budget=4", "streaming:budget=4", "quest:budget=4,page=4", "tidal:budget=4,layout=paper"]
)
def test_only_global_layers_read_sparsely(policy):
    engine = engine_of(policy, "qwen2", **DEEP)
    read = set()
    list(engine.predictions(PROMPT, 30, meter=lambda layer, *_: read.add(layer.index)))
    assert read <= {1, 3, 5, 7} and 7 in read


def test_a_window_is_left_alone_at_the_layer():
    q, segment = case(3, window=6)
    segment.state = Tidal().new_state()
    layer = Layer(0, SCALE, window=6)
    for policy in (
        Tidal(budget=1, full=(), select=0, reselect=()),
        Quest(budget=1, page=1, skip=0),
        Streaming(budget=1),
    ):
        assert torch.equal(read(layer, q, segment, policy.reads(layer, q, segment)), dense(layer, q, segment))


# Bytes

LAYER_BYTES = 2 * 8 * 4  # one token's key in one layer: 2 KV heads of 8 fp32 numbers


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [
        # keys and values of 41 tokens in 6 layers
        ("dense", 6 * 2 * 41),
        # 3 dense layers, of which 2 read all keys again to choose, and 3 that read 9 tokens
        (TIDAL, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 9),
        (MAPPED, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 9),
        # heads of 8 numbers that read everything, beside what is read for all
        (HEADS, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 9 + 2 * 41),
        # 30% of 64
        (GROWING, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 20),
        ("streaming:budget=9", 6 * 2 * 9),
        # 2 dense layers, and 4 that read all keys to choose
        ("oracle:budget=9", 2 * 2 * 41 + 4 * (41 + 2 * 9)),
        # 2 dense layers, and 4 that read two bounds of 11 pages and 2 pages of 4
        ("quest:budget=9,page=4", 2 * 2 * 41 + 4 * (2 * 11 + 2 * 8)),
    ],
)
def test_bytes_read(policy, tokens):
    engine = engine_of(policy, dtype=torch.float32)
    _, segment = rows_after(engine, cached(engine, PROMPT), [5])
    assert segment.bytes_read == tokens * LAYER_BYTES
    # The first generated token comes with the prompt; the second is the one decoded.
    assert engine.generate(PROMPT, max_tokens=2).stats.kv_bytes_per_token == tokens * LAYER_BYTES


def test_bytes_read_of_sliding_layers_are_those_of_the_window():
    engine = engine_of("dense", "qwen2", torch.float32, **DEEP)
    _, segment = rows_after(engine, cached(engine, PROMPT), [5])
    assert segment.bytes_read == (4 * 2 * 41 + 4 * 2 * 9) * LAYER_BYTES
