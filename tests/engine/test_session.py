"""Requests come, share passes, and go; what each of them gained is told as it comes."""

from __future__ import annotations

import pytest
import torch

from drafters import VOCAB, Letters, medusa
from springtide import SpringtideError
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.rows.sampling import Sampling
from tiny import random_tokens, tiny

PROMPT, OTHER = random_tokens(20, vocab=VOCAB), random_tokens(31, seed=4, vocab=VOCAB)
TIDAL = "tidal:budget=5,full=0,select=1"
OPTIONS = (
    {"max_tokens": 12, "policy": "dense"},
    {"max_tokens": 15, "policy": TIDAL, "draft": "lookup"},
    {"max_tokens": 9, "policy": f"{TIDAL},correct=4", "temperature": 0.9, "seed": 7},
    {"max_tokens": 14, "policy": "streaming:budget=5,sinks=1", "draft": medusa(), "stop": "ab"},
    {"max_tokens": 30, "policy": "quest:budget=8,page=4", "top_k": 3, "temperature": 1.2, "seed": 1},
)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny("qwen3", torch.float64, vocab_size=VOCAB), Letters(), adaptive=False)


@pytest.fixture(autouse=True)
def no_costs(monkeypatch):
    """Rows are not measured: any tree does."""
    monkeypatch.setattr("springtide.engine.engine.cost_of_rows", lambda stack, policy: lambda rows: 10 + rows)


def gathered(events, request):
    """Tokens, text and finish reasons that events told of a request."""
    own = [event for event in events if event.request is request]
    return (
        [token for event in own for token in event.token_ids],
        "".join(event.text for event in own),
        [event.finish_reason for event in own],
    )


# What is told


def test_requests_of_all_kinds_share_passes_and_are_each_as_alone(engine):
    alone = [engine.generate(PROMPT, **options) for options in OPTIONS]
    session = engine.session()
    requests = [session.add(PROMPT, **options) for options in OPTIONS]
    assert session.unfinished == requests
    events, most = [], 0
    while session.unfinished:
        events += session.step()
        most = max(most, len({event.request for event in events[-len(requests) :]}))
    assert most == len(requests)
    for request, expected in zip(requests, alone, strict=True):
        tokens, text, reasons = gathered(events, request)
        assert (tokens, text) == (request.output, request.text) == (expected.token_ids, expected.text)
        assert reasons[-1] == request.finish_reason == expected.finish_reason
        assert not any(reasons[:-1]), "the reason is told with the last tokens"
        told, known = engine.output(request).stats, expected.stats
        assert (told.passes, told.drafted_tokens, told.accepted_tokens) == (
            known.passes,
            known.drafted_tokens,
            known.accepted_tokens,
        )


def test_nothing_is_told_of_a_prompt_until_it_is_read(engine, monkeypatch):
    monkeypatch.setattr("springtide.engine.loop.CHUNK", 8)
    session = engine.session()
    request = session.add(PROMPT, max_tokens=1)
    told = [[(event.request, event.text, event.token_ids) for event in session.step()] for _ in range(3)]
    assert told[:2] == [[(request, "", [])]] * 2
    assert told[2] == [(request, request.text, request.output)] and len(request.output) == 1


def test_a_session_goes_on_after_it_was_empty(engine):
    session = engine.session()
    assert session.step() == [] and list(session.run()) == []
    for _ in range(2):
        request = session.add(PROMPT, max_tokens=3)
        assert gathered(list(session.run()), request)[0] == engine.generate(PROMPT, max_tokens=3).token_ids
        assert session.step() == session.unfinished == []


def test_run_serves_those_that_come_meanwhile(engine):
    session = engine.session()
    first, second = session.add(PROMPT, max_tokens=4), None
    for event in session.run():
        if second is None and event.token_ids:
            second = session.add(OTHER, max_tokens=4)
    assert [len(request.output) for request in (first, second)] == [4, 4]


def test_no_more_run_than_there_are_places(engine):
    session = engine.session(max_requests=2)
    requests = [session.add(PROMPT, max_tokens=count) for count in (6, 3, 4)]
    while session.unfinished:
        assert len(session.step()) <= 2
    assert [request.output for request in requests] == [
        engine.generate(PROMPT, max_tokens=count).token_ids for count in (6, 3, 4)
    ]


@pytest.mark.parametrize("places", [0, -3])
def test_a_session_without_places_is_refused(engine, places):
    with pytest.raises(SpringtideError, match="but it must be at least 1"):
        engine.session(max_requests=places)


def test_sessions_of_one_engine_do_not_know_each_other(engine):
    one, two = engine.session(), engine.session()
    a, b = one.add(PROMPT, max_tokens=4), two.add(PROMPT, max_tokens=6, draft=Lookup())
    for _ in range(3):
        assert [event.request for event in one.step()] == [a]
        assert [event.request for event in two.step()] == [b]
    assert (one.unfinished, two.unfinished) == ([a], [b])


# Leaving


@pytest.mark.parametrize("passes", range(7), ids=str)
def test_a_cancelled_request_gains_nothing_more(engine, passes):
    """While it waits for another's prompt, is read itself, decodes and is drafted for."""
    session = engine.session(max_rows=16)
    stays, goes = session.add(PROMPT, max_tokens=12), session.add(OTHER, max_tokens=12, draft=Lookup())
    for _ in range(passes):
        session.step()
    had = goes.output, goes.text, goes.stats()
    session.cancel(goes)
    assert (goes.finish_reason, session.unfinished) == ("cancelled", [stays])
    assert all(event.request is stays for event in session.run())
    assert (goes.output, goes.text, goes.stats()) == had and goes.cache.nbytes == 0
    assert stays.output == engine.generate(PROMPT, max_tokens=12).token_ids
    assert had[0] == engine.generate(OTHER, max_tokens=12).token_ids[: len(had[0])]
    assert engine.output(goes).finish_reason == "cancelled"


def test_another_may_be_cancelled_between_the_events_of_a_pass(engine):
    session = engine.session()
    first, second = session.add(PROMPT, max_tokens=9), session.add(OTHER, max_tokens=9)
    events = []
    for event in session.run():
        events.append(event)
        if event.request is first and len(first.output) == 4:
            session.cancel(second)
    assert gathered(events, second)[0] == second.output, "what the pass gave before is told"
    assert len(second.output) < 9 and len(first.output) == 9


def test_a_place_that_is_given_up_is_taken(engine):
    session = engine.session(max_requests=1)
    first, second, third = (session.add(PROMPT, max_tokens=5) for _ in range(3))
    session.step()
    session.cancel(second)
    session.cancel(first)
    assert session.unfinished == [third]
    assert [event.request for event in session.step()] == [third]


def test_what_does_not_run_cannot_be_cancelled(engine):
    session, other = engine.session(), engine.session()
    cancelled, ended, foreign = (place.add(PROMPT, max_tokens=2) for place in (session, session, other))
    session.cancel(cancelled)
    list(session.run())
    waiting = engine.start(PROMPT)
    for request in (cancelled, ended, foreign, waiting):
        before = request.finish_reason
        with pytest.raises(SpringtideError, match="has ended already, or is not of this session; cancel one that runs"):
            session.cancel(request)
        assert request.finish_reason == before
    assert other.unfinished == [foreign]


# Coming


def test_a_request_comes_once(engine):
    session = engine.session()
    request = session.admit(engine.start(PROMPT, max_tokens=3))
    for asked in (session, engine.session()):
        with pytest.raises(SpringtideError, match="has ended, or is part of a session already; start another one"):
            asked.admit(request)
    assert session.unfinished == [request]
    list(session.run())
    for asked in (session, engine.session()):
        with pytest.raises(SpringtideError, match="has ended, or is part of a session already"):
            asked.admit(request)
        assert asked.unfinished == []
    assert len(request.output) == 3


def test_a_fork_of_a_request_that_runs_may_come_too(engine):
    session = engine.session()
    request = session.add(PROMPT, max_tokens=5)
    session.step()
    twin = engine.session().admit(request.fork())
    assert twin is not request and session.unfinished == [request]


def test_a_request_of_another_engine_is_refused(engine):
    """Its cache is another model's."""
    other = Engine(tiny("qwen3", torch.float64, vocab_size=VOCAB), Letters())
    session = engine.session()
    running = session.add(PROMPT, max_tokens=3)
    request = other.start(PROMPT, max_tokens=3)
    with pytest.raises(SpringtideError, match="The request is of another engine; start it with the engine of this"):
        session.admit(request)
    assert session.unfinished == [running]
    list(session.run())
    with pytest.raises(SpringtideError, match="The request to reuse is of another engine; give one of this"):
        engine.start(PROMPT, reuse=other.read(PROMPT))
    assert other.session().admit(request) is request, "its own engine takes it still"


@pytest.mark.parametrize("wrong", [None, "a prompt", [3, 4]])
def test_what_is_no_request_is_refused(engine, wrong):
    with pytest.raises(SpringtideError, match=r"Give a request that engine.start returned, or add a prompt\."):
        engine.session().admit(wrong)


@pytest.mark.parametrize("option", ["cache_memory", "max_rows", "max_requests"])
@pytest.mark.parametrize("wrong", [1.5, float("nan"), [1], (), "none"])
def test_sizes_of_a_session_are_whole_numbers(engine, option, wrong):
    form = "a size such as 512MiB" if (option, wrong) == ("cache_memory", "none") else "a whole number"
    with pytest.raises(SpringtideError, match=f"{option} is .*, but it must be {form}"):
        engine.session(**{option: wrong})


@pytest.mark.parametrize("option", ["max_rows", "max_requests"])
def test_sizes_that_must_be_there(engine, option):
    with pytest.raises(SpringtideError, match=f"{option} is None, but it must be a whole number"):
        engine.session(**{option: None})


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([3, VOCAB], {}, f"between 0 and {VOCAB - 1}"),
        (None, {}, "A prompt is text or a list of token ids"),
        (b"ab", {}, "A prompt is text or a list of token ids"),
        (PROMPT, {"sampling": {"max_tokens": 3}}, "sampling is a springtide.Sampling; or give its fields as options"),
        (PROMPT, {"max_tokens": 0}, "max_tokens must be at least 1"),
        (PROMPT, {"max_tokens": 2.5}, "max_tokens is 2.5, but it must be a whole number"),
        (PROMPT, {"length": 5}, "Unknown generation option 'length'"),
        (PROMPT, {"sampling": Sampling(), "length": 5}, "Unknown generation option 'length'"),
        (PROMPT, {"policy": "dens"}, "Unknown policy 'dens': choose one of dense, tidal, quest"),
        (PROMPT, {"policy": "tidal:bugdet=5"}, "Policy 'tidal' has no option 'bugdet'"),
        (
            PROMPT,
            {"policy": ["dense"]},
            r"A policy is text such as .*, but not \['dense'\]",
        ),
        (PROMPT, {"draft": "lokup"}, "There is no drafter 'lokup': choose lookup, medusa"),
        (PROMPT, {"draft": 5}, "A drafter is a name such as 'lookup', a folder, or a Drafter, but not 5"),
        (PROMPT, {"draft": "medusa"}, "There is no drafter 'medusa' beside this model"),
        (PROMPT, {"prefill": 0}, "prefill is 0, but it must be between 1 and 20"),
        (PROMPT, {"prefill": 21}, "prefill is 21, but it must be between 1 and 20"),
    ],
    ids=str,
)
def test_what_cannot_be_started_is_not_queued(engine, prompt, options, message):
    session = engine.session()
    running = session.add(PROMPT, max_tokens=2)
    with pytest.raises(SpringtideError, match=message) as caught:
        session.add(prompt, **options)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert session.unfinished == [running]
