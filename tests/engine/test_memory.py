"""What requests of a session share, and what is forgotten."""

from __future__ import annotations

import re

import pytest
import torch

from drafters import VOCAB, medusa
from springtide.attention.policy import STEP, Policy
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.kernels import PAGE
from springtide.rows.segment import PromptEmbeds
from tiny import random_tokens, tiny

DOCUMENT = random_tokens(60)
TIDAL = "tidal:budget=9,full=0,select=1,means=0"


class Counted(Policy):
    """Counts the rows that are computed."""

    rows = 0

    def reads(self, layer, q, segment):
        if layer.index == 0:
            Counted.rows += len(q)
        return super().reads(layer, q, segment)


@pytest.fixture
def rows():
    """How many rows were computed since this was called last."""
    Counted.rows = 0

    def since():
        count, Counted.rows = Counted.rows, 0
        return count

    return since


def engine(policy="dense", name="qwen3", drafter=None, adaptive=True, **overrides):
    model = (tiny.__wrapped__ if "rope_parameters" in overrides else tiny)(name, torch.float64, **overrides)
    return Engine(model, policy=policy, drafter=drafter, adaptive=adaptive)


def ask(session, prompt, count=6, **options):
    """A request that is run to its end."""
    request = session.add(prompt, max_tokens=count, **options)
    for _ in session.run():
        pass
    return request


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral"])
def test_a_document_is_read_once_for_all_questions(rows, name):
    under = engine(Counted(), name)
    prompts = [DOCUMENT + random_tokens(5, seed=seed) for seed in range(8)]
    alone = [under.generate(prompt, max_tokens=6).token_ids for prompt in prompts]
    rows()
    together = under.generate(prompts, max_tokens=6)
    assert [output.token_ids for output in together] == alone
    assert rows() == len(DOCUMENT) + 8 * (5 + 5)
    assert [output.stats.cached_tokens for output in together] == [0] + 7 * [len(DOCUMENT)]


def test_a_turn_goes_on_from_the_one_before(rows):
    session = engine(Counted()).session()
    first = ask(session, DOCUMENT)
    conversation = [*first.tokens, *random_tokens(7, seed=1)]
    expected = engine().generate(conversation, max_tokens=6).token_ids
    rows()
    second = ask(session, conversation)
    assert second.output == expected
    assert second.lent == len(first.tokens) - 1
    assert rows() == 1 + 7 + 5
    again = ask(session, conversation)
    assert again.output == expected and again.lent == len(conversation) - 1


def test_what_was_written_sparsely_is_not_lent():
    session = engine(TIDAL).session()
    first = ask(session, DOCUMENT)
    conversation = [*first.tokens, *random_tokens(7, seed=1)]
    for policy in ("dense", TIDAL):
        expected = engine(policy).generate(conversation, max_tokens=6).token_ids
        request = ask(session, conversation, policy=policy)
        assert request.output == expected
    assert first.lent == 0 and request.lent == len(conversation) - 1


def test_what_runs_is_lent_too(rows):
    session = engine(Counted()).session()
    first = session.add(DOCUMENT, max_tokens=50)
    for _ in range(3):
        session.step()
    second = session.add([*first.tokens, 7], max_tokens=6)
    expected = engine().generate([*first.tokens, 7], max_tokens=6).token_ids
    while second in session.unfinished:
        session.step()
    assert second.output == expected and second.lent > len(DOCUMENT)
    for _ in session.run():
        pass
    assert first.output == engine().generate(DOCUMENT, max_tokens=50).token_ids, "nobody writes to what is shared"


@pytest.mark.parametrize(("kind", "shared"), [("longrope", 0), ("dynamic", 0), ("default", 60)])
def test_rows_that_were_turned_otherwise_are_not_lent(kind, shared):
    """A longer prompt has other rotary frequencies, from its first row on."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
        parameters |= {"original_max_position_embeddings": 64, "factor": 8.0}
    if kind == "dynamic":
        parameters["factor"] = 4.0
    limits = {"max_position_embeddings": 64} if kind == "dynamic" else {}
    under = engine("dense", "llama", rope_parameters=parameters, **limits)
    session, longer = under.session(), [*DOCUMENT, *random_tokens(20, seed=1)]
    ask(session, DOCUMENT, 2)
    expected = under.generate(longer, max_tokens=6).token_ids
    request = ask(session, longer)
    assert request.output == expected and request.lent == shared


def test_drafters_and_samplings_may_differ():
    session = engine(drafter=Lookup(), adaptive=False).session()
    ask(session, DOCUMENT)
    for options in ({"draft": "lookup"}, {"temperature": 0.9, "seed": 3}, {"policy": TIDAL, "stop": ()}):
        expected = engine().generate(DOCUMENT, max_tokens=12, **options).token_ids
        request = ask(session, DOCUMENT, 12, **options)
        assert request.output == expected and request.lent == len(DOCUMENT) - 1


def test_given_tokens_are_decoded_as_if_nobody_had_read_them():
    """Prompts are lent; what is to be decoded is not."""
    under = engine(TIDAL)
    session = under.session()
    ask(session, DOCUMENT)
    expected = ask(under.session(), DOCUMENT, prefill=40).output
    request = ask(session, DOCUMENT, prefill=40)
    assert request.output == expected and request.lent == 40


def test_images_are_lent_to_prompts_with_the_same_one():
    under = engine()
    session = under.session()
    vectors = torch.randn(20, 32, dtype=torch.float64)
    one, same, other = (PromptEmbeds(x, tuple(range(20)), 20) for x in (vectors, vectors, -vectors))
    tokens = [0] * 20 + DOCUMENT[:9]
    outputs = []
    for embeds in (one, one, other, None):
        request = session.admit(under.start(tokens, max_tokens=6, embeds=embeds))
        request.lends = True
        for _ in session.run():
            pass
        outputs.append((request.output, request.lent))
    assert [lent for _, lent in outputs] == [0, 28, 0, 0]
    assert outputs[0][0] == outputs[1][0] != outputs[2][0]
    del same


def test_the_least_recently_used_goes_first():
    under = engine()
    texts = [random_tokens(40, seed=seed) for seed in range(3)]
    size = under.stack.read(texts[0]).nbytes
    session = under.session(cache_memory=3 * size)  # a request may copy a page, and reserves one for that
    for number in (0, 1, 0, 2):
        ask(session, texts[number])
        assert session.memory <= 3 * size
    assert [ask(session, texts[number]).lent for number in (0, 2)] == [39, 39]
    assert ask(session, texts[1]).lent == 0


def test_short_and_different_prompts_share_nothing():
    session = engine().session()
    ask(session, DOCUMENT)
    assert ask(session, [*DOCUMENT[:15], *random_tokens(30, seed=9)]).lent == 0
    assert ask(session, [*DOCUMENT[:16], DOCUMENT[16] - 1]).lent == 16


def test_nothing_is_left_of_what_was_cancelled():
    session = engine().session()
    request, other = (session.add(DOCUMENT, max_tokens=30) for _ in range(2))
    for _ in range(3):
        session.step()
    session.cancel(request)
    gained = list(request.output)
    assert request.cache.nbytes == 0
    for _ in session.run():
        pass
    assert request.output == gained and len(other.output) == 30
    assert session.memory == other.cache.nbytes or session.memory > 0
    session.forget()
    assert session.memory == 0


@pytest.mark.parametrize("drafter", [Lookup(), medusa()], ids=["lookup", "medusa"])
def test_what_waited_for_memory_runs_as_if_it_had_not(drafter):
    under = engine(vocab_size=VOCAB)
    prompts = [[token % VOCAB for token in [*DOCUMENT, seed]] for seed in range(2)]
    alone = [under.generate(prompt, max_tokens=8).token_ids for prompt in prompts]
    limit = 2 * under.stack.page_bytes[None] + drafter.memory(len(DOCUMENT) + 9) + 16  # of one
    session = under.session(cache_memory=limit)
    first, second = (session.add(prompt, max_tokens=8, draft=drafter) for prompt in prompts)
    session.step()
    assert first.output and session.unfinished == [first, second] and second.cache.length == 0
    for _ in session.run():
        assert session.memory <= limit
    assert [first.output, second.output] == alone
    assert second.lent == len(DOCUMENT)


def small_pages(monkeypatch, size=4):
    for module in ("kernels.kv", "rows.cache", "rows.pool", "engine.memory", "model.stack"):
        monkeypatch.setattr(f"springtide.{module}.PAGE", size)
    monkeypatch.setattr("springtide.engine.loop.CHUNK", 8)
    for module in ("loop", "memory"):
        monkeypatch.setattr(f"springtide.engine.{module}.GIVEN_ROWS", 1)


@pytest.mark.parametrize(("name", "share"), [("mistral", 0.16), ("gemma3_text", 0.6), ("qwen3", 1.0)])
def test_layers_with_a_window_keep_what_is_in_it(monkeypatch, name, share):
    small_pages(monkeypatch)
    under = engine(name=name)
    prompt = random_tokens(150)
    alone = under.generate(prompt, max_tokens=20).token_ids
    whole = 44 * sum(under.stack.page_bytes.values())
    assert under.stack.pool.used == 0
    with pytest.raises(SpringtideError, match="but cache_memory is"):
        under.session(cache_memory=int(0.8 * share * whole)).add(prompt, max_tokens=20)
    session = under.session(cache_memory=int(share * whole))
    request = session.add(prompt, max_tokens=20)
    for _ in session.run():
        assert session.memory <= share * whole
    assert request.output == alone


def test_what_a_window_left_behind_stays_until_its_memory_is_wanted(monkeypatch):
    small_pages(monkeypatch)
    under = engine(name="mistral")
    prompt = random_tokens(60)
    early = [*prompt[:30], *random_tokens(5, seed=1)]
    for spare, lent in ((2**40, 30), (0, 0)):
        monkeypatch.setattr("springtide.engine.memory.machine_memory", lambda spare=spare: spare)
        session = under.session()
        first = ask(session, prompt)
        later = [*first.tokens, *random_tokens(5, seed=2)]
        for asked, expected in ((later, len(first.tokens) - 1), (early, lent)):
            again = ask(session, asked)
            assert again.lent == expected
            assert again.output == under.generate(asked, max_tokens=6).token_ids


def test_what_policies_remember_is_reserved_and_counted():
    under = engine("tidal:budget=40,full=0,select=1,means=3")
    prompt, policy, stack = (
        random_tokens(PAGE - 10),
        under.resolve("tidal:budget=40,full=0,select=1,means=3"),
        under.stack,
    )
    count = len(prompt) // STEP  # blocks of tokens, fewer than there may be means
    assert policy.remembered(PAGE - 2, stack.spec) == 2 * count
    pages, states = 2 * stack.page_bytes[None], 2 * count * stack.slot_bytes
    with pytest.raises(SpringtideError, match="but cache_memory is"):
        under.session(cache_memory=pages + states - 1).add(prompt, max_tokens=8)
    session = under.session(cache_memory=pages + states)
    session.add(prompt, max_tokens=8)
    assert max(session.memory for _ in session.run()) == pages // 2 + states


# What is too large


@pytest.mark.parametrize("size", [1, "1kB", "20KiB"])
def test_a_request_that_does_not_fit_is_told_how_much_it_takes(size):
    """And with as much it fits."""
    under = engine()
    with pytest.raises(SpringtideError, match=r"may come to take [\d.]+MiB of memory, for 66 tokens, but ") as caught:
        under.session(cache_memory=size).add(DOCUMENT, max_tokens=6)
    assert f"but cache_memory is {f'{size}B' if size == 1 else size}; raise it, shorten" in str(caught.value)
    needed = re.search(r"take (\S+) of", str(caught.value))
    assert ask(under.session(cache_memory=needed[1]), DOCUMENT).finish_reason == "length"
