"""What a request knows of itself: its figures, and how to go on as two."""

from __future__ import annotations

import pytest
import torch

from drafters import VOCAB, Letters, hidden_transfer, longspec, medusa
from guesses import Guesses
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.engine.request import Decision
from springtide.rows.sampling import Sampling
from stepping import steps
from tiny import random_tokens, tiny

PROMPT = random_tokens(29, vocab=VOCAB)
TIDAL = "tidal:budget=7,full=0,select=1"


def engine_of(drafter=None, policy="dense"):
    return Engine(tiny("qwen3", torch.float64, vocab_size=VOCAB), Letters(), policy, drafter, adaptive=False)


def knowing(prompt=PROMPT, size=6, kind="oracle"):
    """An engine whose drafter knows the output, and the output."""
    truth = engine_of().generate(prompt, max_tokens=40).token_ids
    return engine_of(Guesses([prompt + truth], kind, size=size, vocab=VOCAB)), truth


# Figures


def test_figures_of_plain_decoding():
    stats = engine_of().generate(PROMPT, max_tokens=9).stats
    assert (stats.prompt_tokens, stats.completion_tokens, stats.passes) == (29, 9, 8)
    assert (stats.drafted_tokens, stats.accepted_tokens, stats.acceptance_length) == (0, 0, 1.0)


def test_one_token_takes_no_pass_after_the_prompt():
    stats = engine_of(Lookup()).generate(PROMPT, max_tokens=1).stats
    assert (stats.passes, stats.drafted_tokens, stats.acceptance_length) == (0, 0, None)
    assert stats.tpot_ms is stats.tokens_per_second is stats.kv_bytes_per_token is None


@pytest.mark.parametrize("chunk", [4, 14, 29, 1024])
def test_a_prompt_of_chunks_counts_no_passes_and_no_drafts(chunk, monkeypatch):
    monkeypatch.setattr("springtide.engine.loop.CHUNK", chunk)
    engine, truth = knowing()
    output = engine.generate(PROMPT, max_tokens=20)
    assert output.token_ids == truth[:20]
    # The first token comes with the prompt; a pass gives six drafted ones and one more.
    stats = output.stats
    assert (stats.passes, stats.drafted_tokens, stats.accepted_tokens) == (3, 6 + 6 + 4, 6 + 6 + 4)
    assert stats.acceptance_length == pytest.approx(19 / 3)


def test_drafts_behind_a_stop_string_are_not_accepted():
    """Wherever in a pass it is met, they were drafted for nothing."""
    engine, truth = knowing()
    letters = Letters().decode(truth)
    for count in range(2, 20):
        stop = next(letters[at:count] for at in range(count - 1, -1, -1) if letters.find(letters[at:count]) == at)
        request = engine.start(PROMPT, Sampling(40, stop=(stop,)))
        list(engine.run([request]))
        stats = request.stats()
        assert request.finish_reason == "stop" and request.output == truth[:count]
        assert request.from_draft == [False, *[place % 7 != 6 for place in range(count - 1)]]
        assert stats.accepted_tokens == sum(request.from_draft) <= stats.drafted_tokens
        assert stats.passes == -(-(count - 1) // 7)
        assert stats.acceptance_length == pytest.approx((count - 1) / stats.passes)


def test_a_cancelled_request_counts_what_it_had():
    engine, truth = knowing()
    session = engine.session()
    request = session.add(PROMPT, max_tokens=30)
    assert engine.output(request).stats.ttft_ms is None
    for passes in range(3):
        session.step()
        stats = engine.output(request).stats
        assert (stats.passes, stats.completion_tokens, stats.accepted_tokens) == (passes, 1 + 7 * passes, 6 * passes)
    session.cancel(request)
    assert engine.output(request).token_ids == truth[:15]
    assert engine.output(request).stats == stats


@pytest.mark.parametrize("given", [1, 5])
def test_drafts_for_the_first_token_count_too(given):
    """Where the end of the prompt is decoded, its last token is drafted for."""
    engine, truth = knowing()
    request = engine.start(PROMPT, Sampling(17), prefill=len(PROMPT) - given)
    list(engine.run([request]))
    assert request.output == truth[:17]
    assert request.from_draft == [*[*[True] * 6, False] * 2, *[True] * 2, False]
    stats = request.stats()
    assert stats.accepted_tokens == stats.drafted_tokens == 14
    # The pass that gave the first token is not one after it.
    assert (stats.passes, stats.acceptance_length) == (2, pytest.approx(10 / 2))


def test_what_is_gained_is_appended():
    request = engine_of().start(PROMPT, max_tokens=9)
    request.gain(Decision(), 100, 0, 1.0)
    assert (request.first_token, request.tokens) == (None, PROMPT)
    request.gain(Decision([0], [4], "e"), 100, 0, 2.0)
    request.gain(Decision([0, 2], [5, 6], "fg", "stop", accepted=1), 30, 5, 4.0)
    assert (request.output, request.from_draft, request.finish_reason) == ([4, 5, 6], [False, True, False], "stop")
    stats = request.stats()
    assert (stats.tpot_ms, stats.kv_bytes_per_token) == (1000.0, 15.0)
    assert (stats.passes, stats.drafted_tokens, stats.accepted_tokens, stats.acceptance_length) == (1, 5, 1, 2.0)


# Forks

DRAFTERS = {
    "none": Drafter(),
    "lookup": Lookup(),
    "medusa": medusa(),
    "hidden transfer": hidden_transfer(2, 2, 3),
    "longspec": longspec(),
}


@pytest.mark.parametrize("policy", ["dense", TIDAL, f"{TIDAL},correct=5"])
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS.keys())
def test_a_fork_and_its_origin_go_on_alone(drafter, policy):
    engine = engine_of(drafter, policy)
    expected = engine_of(policy=policy).generate(PROMPT, max_tokens=20)
    whole = engine.start(PROMPT, Sampling(20))
    passes = steps(engine, whole)
    for _ in range(4):
        next(passes)
    twin = whole.fork()
    for request in (whole, twin):
        list(engine.run([request]))
        assert (request.output, request.text) == (expected.token_ids, expected.text)
        assert len(request.from_draft) == 20
    assert engine.output(whole).stats.passes == engine.output(twin).stats.passes
