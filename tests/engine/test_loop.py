"""What a pass is made of: rows of every kind side by side, one LM head, one question to each drafter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from drafters import VOCAB, Letters, Turns, hidden_transfer, longspec, medusa
from guesses import Guesses
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.drafting.several import Several
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.engine.loop import GIVEN_ROWS, Loop
from springtide.errors import SpringtideError
from stepping import passes
from tiny import random_tokens, tiny

PROMPT, OTHER = random_tokens(30, vocab=VOCAB), random_tokens(21, seed=3, vocab=VOCAB)
TIDAL = "tidal:budget=5,full=0,select=1"


@pytest.fixture(autouse=True)
def no_costs(monkeypatch):
    """Rows are not measured: any tree does."""
    monkeypatch.setattr("springtide.engine.engine.cost_of_rows", lambda stack, policy: lambda rows: 10 + rows)


def engine_of(drafter=None, **overrides):
    model = tiny("qwen3", torch.float64, vocab_size=VOCAB, **overrides)
    return Engine(model, Letters(), drafter=drafter, adaptive=False)


def loop_of(engine, **options):
    return Loop(engine.stack, engine.eos, **options)


class Chain(Drafter):
    """Drafts a long chain, and keeps the views that it was shown."""

    def __init__(self, length=20):
        self.length, self.views = length, []

    def propose(self, views):
        self.views.append([replace(view, tokens=list(view.tokens)) for view in views])
        return [TokenTree([view.tokens[-1], *[0] * self.length], list(range(-1, self.length))) for view in views]


def planned(plan):
    """What a plan holds, in short: kind of rows, where they begin, how many, and how many are asked for a token."""
    segment = plan.segment
    return segment.kind, segment.prefix, len(segment.tokens), segment.outputs


# Rows


def test_a_prompt_is_read_in_chunks_of_which_the_last_is_asked(monkeypatch):
    monkeypatch.setattr("springtide.engine.loop.CHUNK", 12)
    engine, seen = engine_of(), []
    request, loop = engine.start(PROMPT, max_tokens=2), loop_of(engine)
    while request.finish_reason is None:
        seen += map(planned, loop.plan([request]))
        loop.step([request])
    assert seen == [("prompt", 0, 12, 0), ("prompt", 12, 12, 0), ("prompt", 24, 6, 1), ("decode", 30, 1, 1)]


@pytest.mark.parametrize(
    ("policy", "rows"), [("dense", GIVEN_ROWS), ("quest:budget=4,page=4", 1), ("streaming:budget=5", GIVEN_ROWS)]
)
def test_given_tokens_are_decoded_in_few_passes_where_rows_do_not_depend_on_each_other(policy, rows):
    engine = engine_of()
    prompt = random_tokens(150, vocab=VOCAB)
    request, loop = engine.start(prompt, max_tokens=1, prefill=9, policy=policy), loop_of(engine)
    loop.step([request])
    given = 9
    while given < 149:
        assert planned(loop.plan([request])[0]) == ("decode", given, min(rows, 149 - given), 0)
        loop.step([request])
        given = request.cache.length
    assert planned(loop.plan([request])[0]) == ("decode", 149, 1, 1)


def test_a_pass_holds_rows_of_every_kind_in_the_order_of_the_requests(monkeypatch):
    monkeypatch.setattr("springtide.engine.loop.CHUNK", 12)
    engine, sizes = engine_of(), []
    loop, logits = loop_of(engine), engine.stack.logits

    def counted(hidden):
        sizes.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(engine.stack, "logits", counted)
    refreshed = engine.start(OTHER, max_tokens=9, policy=f"{TIDAL},correct=2")
    drafted = engine.start(OTHER, max_tokens=9, draft=Chain(4))
    plain = engine.start(OTHER, max_tokens=9, policy="streaming:budget=5")
    given = engine.start(PROMPT, max_tokens=9, prefill=5)
    watched = engine.start(PROMPT, prefill=20, watch=lambda rows: None)
    for request in (refreshed, drafted, plain):
        while not request.output:
            loop.step([request])
    for request in (refreshed, refreshed, given, watched, watched):
        loop.step([request])
    batch = [engine.start(PROMPT, max_tokens=9), drafted, watched, refreshed, given, plain]
    sizes.clear()
    assert [planned(plan) for plan in loop.plan(batch)] == [
        ("prompt", 0, 12, 0),
        ("verify", 21, 5, 5),
        ("decode", 20, 9, 9),
        ("refresh", 21, 3, 1),
        ("decode", 5, 24, 0),
        ("decode", 21, 1, 1),
    ]
    gained = loop.step(batch)
    assert [request for request, _ in gained] == batch
    assert [bool(decision.tokens) for _, decision in gained] == [False, True, False, True, False, True]
    assert sizes == [5 + 9 + 1 + 1], "the LM head runs once, for the rows that are asked"
    assert loop.plan([watched] * 0) == []


def test_without_rows_that_are_asked_the_lm_head_is_left_out(monkeypatch):
    monkeypatch.setattr("springtide.engine.loop.CHUNK", 12)
    engine = engine_of()
    monkeypatch.setattr(engine.stack, "logits", lambda hidden: pytest.fail("there is nothing to predict"))
    loop_of(engine).step([engine.start(PROMPT), engine.start(OTHER)])


def test_a_pass_that_fails_may_be_made_again(monkeypatch):
    """Nothing is kept before all is computed."""
    expected = engine_of().generate([PROMPT, OTHER], max_tokens=20)
    engine, failed = engine_of(medusa()), 0
    forward = engine.stack.forward

    def failing(segments):
        nonlocal failed
        hidden = forward(segments)
        failed += 1
        if failed % 2:
            raise MemoryError
        return hidden

    monkeypatch.setattr(engine.stack, "forward", failing)
    batch = [
        engine.start(prompt, max_tokens=20, policy=policy) for prompt, policy in ((PROMPT, "dense"), (OTHER, TIDAL))
    ]
    expected = [engine_of().generate(request.tokens, max_tokens=20, policy=request.policy) for request in batch]
    loop = loop_of(engine)
    while running := [request for request in batch if request.finish_reason is None]:
        with pytest.raises(MemoryError):
            loop.step(running)
        loop.step(running)
    assert [request.output for request in batch] == [output.token_ids for output in expected]
    assert all(request.accepted for request in batch)


# Drafts


def test_a_drafter_sees_all_requests_that_are_its_own_at_once():
    engine, one, two = engine_of(), Chain(), Chain()
    drafters = [one, two, None, one]
    batch = [engine.start(PROMPT[:n], max_tokens=9, draft=d) for n, d in zip((9, 12, 15, 18), drafters, strict=True)]
    for _ in zip(range(2), passes(engine, batch), strict=False):
        pass
    (views,), (other,) = one.views, two.views
    assert [view.cache for view in views] == [batch[0].cache, batch[3].cache]
    assert [view.cache for view in other] == [batch[1].cache]
    assert [len(view.tokens) for view in (*views, *other)] == [10, 19, 13]
    assert all(view.draft is request.draft for view, request in zip(views, (batch[0], batch[3]), strict=True))


@pytest.mark.parametrize(
    ("options", "overrides", "depth"),
    [
        ({"max_tokens": 4}, {}, 2),
        ({"max_tokens": 2}, {}, 0),
        ({"max_tokens": 99}, {"max_position_embeddings": 36}, 4),
        ({"max_tokens": 99, "policy": f"{TIDAL},correct=3"}, {}, 2),
        ({"max_tokens": 99, "policy": "streaming:budget=10%"}, {}, 33),
        ({"max_tokens": 99}, {}, 97),
    ],
    ids=str,
)
def test_a_tree_goes_no_deeper_than_what_can_be_kept(options, overrides, depth):
    """Of the 30 tokens' next ones the first came with the prompt, and each pass gives one of its own."""
    drafter = Chain(length=50)
    engine = engine_of(drafter, **overrides)
    request, loop = engine.start(PROMPT, **options), loop_of(engine)
    loop.step([request])
    plan = loop.plan([request])[0]
    assert (drafter.views[0][0].depth, len(plan.segment.tokens) - 1) == (depth, min(depth, 50))
    assert plan.tree.tokens == plan.segment.tokens and plan.tree.parents == plan.segment.parents


def test_drafters_of_different_kinds_grow_rows_in_one_pass():
    """Each in its own segments, before its own layers."""
    kinds = [
        hidden_transfer(0, 1, 1),
        hidden_transfer(2, 2, 3),
        hidden_transfer(1, 2, 3),
        medusa(),
        longspec(),
        Lookup(),
        Drafter(),
    ]
    options = [{"policy": policy, "max_tokens": 16} for policy in ("dense", TIDAL)]
    engine = engine_of()
    alone = {}
    for n, drafter in enumerate(kinds):
        for m, own in enumerate(options):
            request = engine.start(PROMPT, draft=drafter, **own)
            list(engine.run([request]))
            alone[n, m] = request
    batch = {
        (n, m): engine.start(PROMPT, draft=drafter, **own)
        for n, drafter in enumerate(kinds)
        for m, own in enumerate(options)
    }
    list(passes(engine, list(batch.values())))
    for place, request in batch.items():
        other = alone[place]
        assert (request.output, request.drafted, request.accepted) == (other.output, other.drafted, other.accepted)
        assert request.output == alone[len(kinds) - 1, place[1]].output
    assert all(request.accepted for place, request in batch.items() if place[0] < len(kinds) - 1)


# Watching


def test_what_is_watched_is_not_generated():
    engine, rows = engine_of(Lookup()), []
    request = engine.start(PROMPT, prefill=12, watch=rows.append)
    list(passes(engine, [request]))
    assert (request.tokens, request.output, request.finish_reason) == (PROMPT, [], "length")
    got = torch.cat(rows)
    assert got.shape == (18, VOCAB) and request.stats().passes == 0
    for at in (12, 20, 29):
        assert engine.generate(PROMPT[:at], max_tokens=1).token_ids == [int(got[at - 12].argmax())]


@pytest.mark.parametrize("policy", ["dense", TIDAL, f"{TIDAL},correct=4", "quest:budget=4,page=4,skip=1"])
def test_what_is_watched_beside_others_is_as_alone(policy):
    engine, rows = engine_of(), []
    expected = torch.cat(list(engine.using(policy).predictions(PROMPT, 12)))
    batch = [
        engine.start(OTHER, max_tokens=9, draft=Lookup()),
        engine.start(PROMPT, prefill=12, policy=policy, watch=rows.append),
        engine.start(OTHER, max_tokens=9, policy=TIDAL),
    ]
    list(passes(engine, batch))
    torch.testing.assert_close(torch.cat(rows), expected, atol=1e-10, rtol=0)


# Drafters that are left out


class Told:
    """A governor that always drafts, and keeps what it is told."""

    best = gain = None

    def __init__(self):
        self.chosen, self.told = [], []

    def choose(self, sequences, context):
        self.chosen.append((sequences, context))
        return 1

    def record(self, tokens, seconds):
        self.told.append(self.chosen[-1][0])


class Named(Guesses):
    """A drafter that may be left out."""

    name = "guesses"


def test_each_drafter_has_a_governor_that_knows_its_own_passes_alone():
    engine, made = engine_of(), []
    loop = loop_of(engine, governor=lambda ways: made.append(Told()) or made[-1])
    one, two = (Named([], "wrong", vocab=VOCAB) for _ in range(2))
    a, b, c = (engine.start(PROMPT, max_tokens=50, draft=draft) for draft in (one, two, one))
    for request in (a, b, c):
        loop.step([request])
    for batch in ([a], [b], [a, c], [b]):
        loop.step(batch)
    assert [governor.told for governor in made] == [[1, 2], [1, 1]]
    loop.step([a, b])
    assert [governor.told for governor in made] == [[1, 2], [1, 1]], "whose drafts took how long is not known"


class Ways(Drafter):
    """Drafts one token, and keeps the ways that it was asked for."""

    name = "both"
    ways = ("near", "far")

    def __init__(self):
        self.asked = []

    def propose(self, views):
        self.asked.append([view.way for view in views])
        return [TokenTree([view.tokens[-1], 0], [-1, 0]) for view in views]


def test_a_drafter_is_told_which_of_its_ways_is_wanted():
    engine, drafter = engine_of(), Ways()
    batch = [engine.start(prompt, max_tokens=8, draft=drafter) for prompt in (PROMPT, OTHER)]
    for _ in zip(range(7), passes(engine, batch, governor=Turns), strict=False):
        pass
    assert drafter.asked == [[0, 0], [1, 1]] * 2, "the prompt's pass asks for nothing, and every third one is plain"
    alone = engine.start(PROMPT, max_tokens=4, draft=drafter)
    drafter.asked.clear()
    list(passes(engine, [alone]))
    assert {way for ways in drafter.asked for way in ways} == {0}, "without a governor it is the first"


def test_the_governor_knows_sequences_and_their_mean_context():
    engine, governor, drafter = engine_of(), Told(), Chain(0)
    drafter.name = "chain"
    loop = loop_of(engine, governor=lambda ways: governor)
    batch = [engine.start(prompt, max_tokens=8, draft=drafter) for prompt in (PROMPT, OTHER)]
    for _ in range(3):
        loop.step(batch)
    assert governor.chosen == [(2, (30 + 21) // 2), (2, (31 + 22) // 2)]


def test_statistics_name_what_is_fastest():
    engine, governor = engine_of(), Told()
    request = engine.start(PROMPT, max_tokens=4, draft=Ways())
    list(passes(engine, [request], governor=lambda ways: governor))
    assert request.stats().fastest is None
    for best, name in enumerate(("none", "near", "far")):
        governor.best = best
        request = engine.start(PROMPT, max_tokens=4, draft=Ways())
        list(passes(engine, [request], governor=lambda ways: governor))
        assert request.stats().fastest == name


@pytest.mark.parametrize(
    "options", [{"accept": "typical", "temperature": 0.8}, {"policy": "quest:budget=4,page=4,skip=1"}], ids=str
)
def test_where_drafts_show_a_drafter_uses_its_first_way_and_several_are_refused(options):
    drafter = Ways()
    request = engine_of().start(PROMPT, draft=drafter, max_tokens=4, **options)
    list(passes(engine_of(), [request], governor=lambda ways: Told()))
    assert {way for ways in drafter.asked for way in ways} == {0}
    with pytest.raises(SpringtideError, match="would be chosen by measured time; choose one drafter"):
        engine_of().start(PROMPT, draft=Several((drafter, Lookup())), **options)
