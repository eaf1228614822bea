"""What drafts by a sparse policy gain, by what passes cost and how much is said to be accepted."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from springtide import SpringtideError
from springtide.attention import parse_policy
from springtide.attention.calibration import VERSION
from springtide.benchmarks import contenders, rows
from springtide.benchmarks.simulated import Drafts, Round, best, break_even, parse_drafts, simulated, steps_of
from springtide.engine.engine import Engine
from springtide.model.cost import lines
from tiny import tiny

FIELDS = (
    "simulated policy budget context threads dtype tau rows accept tokens passes dense_ms sparse_ms draft_ms verify_ms "
    "measured_ms tokens_per_round ms_per_token speedup break_even"
)
shares = st.floats(0.01, 1)
times = st.floats(0.01, 1000)
taus = st.floats(1, 12)
rounds = st.builds(Round, st.integers(1, 64), st.integers(1, 64), times, times)


@given(rounds, shares, shares)
def test_a_round_gives_more_the_more_is_accepted(each, low, high):
    low, high = sorted((low, high))
    assert 1 <= each.gives(low) <= each.gives(high) <= each.tokens + 1 == each.gives(1.0)
    assert each.ms_per_token(high) <= each.ms_per_token(low)
    if high < 0.99:
        assert each.gives(high) == pytest.approx((1 - high ** (each.tokens + 1)) / (1 - high))


@given(rounds, times)
def test_the_break_even_is_where_a_token_takes_as_long_as_a_dense_step(each, dense_ms):
    accept = each.break_even(dense_ms)
    if accept is None:
        assert each.ms_per_token(1.0) >= dense_ms * (1 - 1e-9)
    elif accept == 0:
        assert each.ms_per_token(0.0) <= dense_ms * (1 + 1e-9)
    else:
        assert each.ms_per_token(accept) == pytest.approx(dense_ms)


@given(taus, times, times, times, shares, st.integers(1, 64))
def test_rounds_of_drafts(tau, draft_ms, one, more, accept, tokens):
    drafts, verify_ms = Drafts(tau), lines((1, 32), (one, one + more))
    found = drafts.rounds(draft_ms, verify_ms)
    assert [each.tokens for each in found] == list(range(1, 32))
    assert all(each.tokens / tau <= each.passes + 1e-6 and (each.passes - 1) * tau < each.tokens for each in found)
    assert all(each.ms == pytest.approx(each.passes * draft_ms + verify_ms(each.tokens + 1)) for each in found)
    fastest = best(found, accept)
    assert all(fastest.ms_per_token(accept) <= each.ms_per_token(accept) for each in found)
    (alone,) = replace(drafts, tokens=tokens).rounds(draft_ms, verify_ms)
    assert alone == Round(tokens, alone.passes, draft_ms, verify_ms(tokens + 1))
    if tokens < 32:
        assert alone in found


@given(taus, times, times, times)
def test_the_break_even_of_several_rounds_is_the_least(tau, draft_ms, dense_ms, more):
    found = Drafts(tau).rounds(draft_ms, lines((1, 32), (dense_ms, dense_ms + more)))
    accept = break_even(found, dense_ms)
    if accept is None:
        assert all(each.ms_per_token(1.0) > dense_ms for each in found)
    else:
        assert best(found, accept).ms_per_token(accept) <= dense_ms * (1 + 1e-9)
        below = best(found, accept - 1e-6)
        assert below.ms_per_token(accept - 1e-6) > dense_ms * (1 - 1e-9)


def test_a_round_by_hand():
    """Sparse steps at half of a dense one's time, four of them, then a dense pass that takes a little longer."""
    (each,) = Drafts(tokens=4).rounds(50.0, lines((1, 5), (100, 110)))
    assert (each.passes, each.ms) == (4, 310)
    assert each.gives(0.5) == 1 + 0.5 + 0.25 + 0.125 + 0.0625
    assert each.ms_per_token(1.0) == 62
    assert each.break_even(61.0) is None and each.break_even(62.0) == pytest.approx(1)
    assert each.break_even(310.0) == each.break_even(400.0) == 0
    (each,) = Drafts(tau=3, tokens=7).rounds(50.0, lines((1, 8), (100, 110)))
    assert (each.passes, each.ms) == (3, 260)


def test_drafts_are_read_from_text():
    assert parse_drafts("sim") == Drafts() == Drafts(1.0, None, None, (0.7, 0.8, 0.9, 0.95, 1.0))
    assert parse_drafts("sim:tau=2.5,rows=4,tokens=9,accept=0.8+1") == Drafts(2.5, 4, 9, (0.8, 1.0))
    assert [Drafts(tau).sparse_rows for tau in (1, 1.1, 2.5, 3)] == [1, 3, 5, 6]
    assert Drafts(1.5, rows=2).sparse_rows == 2
    assert Drafts().dense_rows == (1, 2, 4, 8, 16, 32) and Drafts(tokens=5).dense_rows == (1, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sim:tau=0", "sim: tau is 0, but it must be at least 1 and at most 1024."),
        ("sim:tau=nan", "sim: tau is 'nan', but it must be a number."),
        ("sim:tau=1e308", "sim: tau is 1e+308, but it must be at least 1 and at most 1024."),
        ("sim:rows=0", "sim: rows is 0, but it must be at least 1 and at most 1024."),
        ("sim:rows=2.5", "sim: rows is '2.5', but it must be a whole number."),
        ("sim:tau=3,rows=2", "sim: 2 rows give no more than 2 tokens, but tau is 3; give more rows."),
        ("sim:tokens=0", "sim: tokens is 0, but it must be at least 1 and at most 1023."),
        ("sim:accept=0", "sim: accept is 0, but it must be above 0 and at most 1."),
        ("sim:accept=0.9+1.1", "sim: accept is 1.1, but it must be above 0 and at most 1."),
        ("sim:accept=nan", "sim: accept is 'nan', but it must be numbers joined by +."),
        ("sim:depth=3", "Simulated drafter 'sim' has no option 'depth'; its options are: tau, rows, tokens, accept."),
        ("lookup:depth=3", "bench decode times steps, so that --draft takes 'sim' with its options, not 'lookup:"),
        ("", "bench decode times steps, so that --draft takes 'sim' with its options, not ''; what drafters gain is"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text, message):
    with pytest.raises(SpringtideError) as caught:
        parse_drafts(text)
    assert str(caught.value).startswith(message) and str(caught.value).endswith(".")


def test_what_is_measured_and_what_follows(monkeypatch):
    monkeypatch.setattr(contenders, "PAUSE", 0)
    monkeypatch.setattr(rows, "PAUSE", 0)
    engine = Engine(tiny("llama"), calibration={"version": VERSION, "tidal": {"full": [0], "select": [1]}})
    policies = [engine.resolve(parse_policy(name)) for name in ("tidal:budget=16", "streaming:budget=25%")]
    drafts = Drafts(tau=2, tokens=5, accept=(0.5, 1.0))
    *before, found = simulated(engine, policies, drafts, [40, 70], 2, "random")
    assert before == [None] * steps_of(2, 2, drafts, 2)
    names = [("tidal", 16), ("streaming", "25%")]
    assert [(row.context, row.policy, row.budget, row.accept) for row in found] == [
        (context, *name, accept) for context in (40, 70) for name in names for accept in (0.5, 1.0)
    ]
    for row in found:
        assert list(asdict(row)) == FIELDS.split()
        assert (row.simulated, row.tau, row.rows, row.tokens, row.passes) == (True, 2, 4, 5, 3)
        assert (row.threads, row.dtype) == (torch.get_num_threads(), "float32")
        assert row.measured_ms == [(1, row.dense_ms), (6, pytest.approx(row.verify_ms))]
        assert row.tokens_per_round == sum(row.accept**place for place in range(6))
        ms = (3 * row.draft_ms + row.verify_ms) / row.tokens_per_round
        assert row.ms_per_token == pytest.approx(ms)
        assert row.speedup == pytest.approx(row.dense_ms / ms)
        other = next(each for each in found if each.context == row.context and each.policy != row.policy)
        assert (other.dense_ms, other.verify_ms) == (row.dense_ms, row.verify_ms)
        assert math.isfinite(row.sparse_ms) and row.sparse_ms > 0
