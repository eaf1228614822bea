"""Lookup: which tokens it drafts, and that the output is the one without it."""

from __future__ import annotations

from copy import copy
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from springtide.attention.policy import Policy
from springtide.drafting.drafter import View
from springtide.drafting.lookup import OCCURRENCES, TRUST, Index, Lookup, merged
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.loading import load
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.sampling import Sampling
from stepping import check_cache, poison, steps
from tiny import random_tokens, tiny

VOCAB = 7  # so few that much of what is looked up is right
PROMPT = random_tokens(29, vocab=VOCAB)
TIDAL = "tidal:budget=7,full=0,select=1"
POLICIES = ["dense", TIDAL, f"{TIDAL},correct=5"]
SAMPLINGS = {
    "greedy": {},
    "temperature": {"temperature": 0.8, "seed": 1},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2, "seed": 2},
}
texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def engine(policy="dense", drafter=None, **overrides):
    model = tiny("qwen3", torch.float64, vocab_size=VOCAB, **overrides)
    return Engine(model, policy=policy, drafter=drafter or Lookup(), adaptive=False)


@cache
def plain(policy="dense", prompt=tuple(PROMPT), **options):
    """Output without a drafter."""
    model = tiny("qwen3", torch.float64, vocab_size=VOCAB)
    return Engine(model, policy=policy).generate(list(prompt), max_tokens=48, **options).token_ids


# What is drafted


def propose(text, state=None, **options):
    drafter = Lookup(**options)
    return proposed(drafter, drafter.new_state() if state is None else state, text)


def proposed(drafter, state, tokens):
    (tree,) = drafter.propose([View(tokens, 99, state, Cache(Pool(1)), Policy(), None)])
    return tree


def test_the_continuation_of_the_longest_match_is_drafted():
    # 1 2 was followed by 5 last, but 9 1 2 by 3.
    assert propose([9, 1, 2, 3, 4, 6, 7, 1, 2, 5, 9, 1, 2]) == TokenTree([2, 3, 4, 6, 7, 1, 2], list(range(-1, 6)))


def test_a_longer_match_is_trusted_for_more():
    text = list(range(30))
    for length in range(1, 10):
        tree = propose([*text, 40, *text[:length]])
        assert len(tree.tokens) - 1 == min(TRUST * min(length, 8), 16)


def test_nothing_is_drafted_without_a_match():
    assert propose([1]) == propose([4, 3, 2, 1]) == TokenTree.single(1)
    assert propose([1, 2, 1], min_ngram=2) == TokenTree.single(1)


def test_a_loop_goes_on():
    assert propose([1, 2, 3, 1, 2, 3, 1, 2, 3]).tokens == [3, *[1, 2, 3] * 4]
    assert propose([5, 5, 5, 5, 5]).tokens == [5] * 9


def test_different_continuations_are_branches_that_share_the_draft():
    tokens = [8, 9, 1, 2, 3, 8, 9, 1, 4, 5, 8, 9, 1, 2, 6, 8, 9]
    tree = propose(tokens)
    # The latest occurrence first: 1 2 6 8, then 1 4 5, then what is left for 1 2 3.
    assert tree == TokenTree([9, 1, 2, 4, 6], [-1, 0, 1, 1, 2])
    assert propose(tokens, tokens=2) == TokenTree([9, 1, 2], [-1, 0, 1])
    assert propose(tokens, depth=1) == TokenTree([9, 1], [-1, 0])
    assert propose(tokens, depth=2) == TokenTree([9, 1, 2, 4], [-1, 0, 1, 1])


def occurrences(tokens, shortest, longest):
    """By definition: length of the longest n-gram that ends ``tokens`` and occurs before, and where it ends there."""
    for n in range(min(longest, len(tokens)), shortest - 1, -1):
        ends = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[len(tokens) - n :]]
        if ends:
            return n, ends
    return 0, []


@settings(deadline=None, max_examples=200)
@given(texts, st.integers(1, 3), st.integers(0, 3), st.integers(1, 9))
def test_the_match_is_the_longest_and_its_latest_places_are_known(text, shortest, more, step):
    index = Index(shortest, shortest + more)
    for length in [*range(1, len(text), step), len(text)]:
        index.read(text[:length])
        size, ends = occurrences(text[:length], shortest, shortest + more)
        assert index.match(text[:length]) == (size, ends[: -OCCURRENCES - 1 : -1])


@settings(deadline=None, max_examples=200)
@given(texts, st.integers(1, 8))
def test_every_branch_follows_an_occurrence(text, most):
    starts = occurrences(text, 1, 8)[1][: -OCCURRENCES - 1 : -1]
    tree = merged(text, starts, most, depth=most)
    assert len(tree.tokens) <= most + 1
    ahead = [[*text[start:], *(text[start:] * most)][:most] for start in starts]
    trails = [[]]
    for parent, token in zip(tree.parents[1:], tree.tokens[1:], strict=True):
        trails.append([*trails[parent], token])
    assert all(any(path[: len(trail)] == trail for path in ahead) for trail in trails[1:])
    assert len(set(map(tuple, trails))) == len(trails), "no node is there twice"
    if len(tree.tokens) <= most:
        assert all(path in trails for path in ahead), "nothing is left out without need"


@settings(deadline=None, max_examples=200)
@given(texts, st.data())
def test_a_cropped_replaced_or_forked_sequence_is_read_anew(text, data):
    drafter = Lookup()
    state = drafter.new_state()
    proposed(drafter, state, text)
    other = text[: data.draw(st.integers(0, len(text)))] + data.draw(texts)
    known = slice(max(0, len(text) - 8), len(text))
    assume(other[: len(text)] == text or other[known] != text[known])  # what is cropped and grows again differs there
    twin = copy(state)
    assert proposed(drafter, twin, other) == propose(other)
    assert proposed(drafter, state, [*text, 1]) == propose([*text, 1]), "a fork leaves its origin alone"


@settings(deadline=None, max_examples=100)
@given(texts, texts, st.integers(0, 5))
def test_rows_that_are_no_tokens_are_in_no_ngram(text, more, holes):
    text = [-1] * holes + text
    state = Lookup().new_state()
    proposed(Lookup(), state, text)
    tree = proposed(Lookup(), state, text + more)
    plain = propose((text + more)[holes:])
    assert tree == plain and min(tree.tokens) >= 0


def test_a_step_reads_its_new_tokens_only():
    class Spy(list):
        read = 0

        def __getitem__(self, key):
            got = super().__getitem__(key)
            Spy.read += len(got) if isinstance(key, slice) else 1
            return got

    text = Spy(random_tokens(20_000, vocab=50))
    drafter = Lookup()
    state = drafter.new_state()
    proposed(drafter, state, text)
    Spy.read = 0
    text.append(3)
    proposed(drafter, state, text)
    assert Spy.read < 500


def test_the_index_is_small():
    """At the length of a book, whether it repeats itself or not; the tokens are not in it."""
    for text in (random_tokens(20_000, vocab=5000), random_tokens(500) * 40, [7] * 20_000):
        state = Lookup().new_state()
        state.read(text)
        assert 0 < state.nbytes < 50 * len(text)
        size = state.nbytes
        twin = state.fork()
        twin.read([*text, 1, 2, 3])
        fresh = Lookup().new_state()
        fresh.read(text)
        assert (state.nbytes, state.match(text)) == (size, fresh.match(text)), "a fork leaves its origin alone"


BAD = [{"tokens": 0}, {"depth": 0}, {"min_ngram": 0}, {"ngram": 0}, {"min_ngram": 3, "ngram": 2}, {"ngram": 2**16}]


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_refused(options):
    with pytest.raises(SpringtideError, match="lookup"):
        engine(drafter=Lookup(**options))


def test_a_shortest_ngram_above_the_longest_names_both():
    with pytest.raises(SpringtideError, match="lookup: ngram is 2, but min_ngram is 3; raise one or lower the other"):
        engine(drafter=Lookup(ngram=2, min_ngram=3))


# What comes of it


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_output_is_as_without_a_drafter(policy, options):
    expected = plain(policy, **options)
    for drafter in (Lookup(), Lookup(tokens=3, ngram=2), Lookup(tokens=40, depth=30, min_ngram=2)):
        out = engine(policy, drafter).generate(PROMPT, max_tokens=48, **options)
        assert out.token_ids == expected
        assert 0 < out.stats.accepted_tokens < out.stats.drafted_tokens


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_batch_is_each_alone_without_a_drafter(policy, options):
    prompts = [random_tokens(length, seed=length, vocab=VOCAB) for length in (1, 6, 17, 40)]
    outputs = engine(policy).generate(prompts, max_tokens=48, **options)
    assert [out.token_ids for out in outputs] == [plain(policy, tuple(prompt), **options) for prompt in prompts]


def test_end_of_sequence_inside_a_branch():
    full = plain()
    inside = 0
    for token in set(full):
        under = engine()
        under.eos = frozenset([token])
        out = under.generate(PROMPT, max_tokens=48)
        assert out.token_ids == full[: full.index(token) + 1] and out.finish_reason == "stop"
        inside += out.stats.accepted_tokens > 0
    assert inside, "some ends were drafted"


def test_stop_strings_inside_a_branch():
    text = "the cat sat on the mat. the cat sat on the mat. the cat"
    drafted, undrafted = load("pocket", dtype="float32").drafting(Lookup()), load("pocket", dtype="float32")
    drafted.adaptive = False
    whole = undrafted.generate(text, max_tokens=24)
    assert drafted.generate(text, max_tokens=24).stats.accepted_tokens > 8
    for stop in (whole.text[5:9], whole.text[-6:-3]):
        one, other = (e.generate(text, max_tokens=24, stop=stop) for e in (drafted, undrafted))
        assert one.finish_reason == "stop" and stop not in one.text
        assert (one.text, one.token_ids) == (other.text, other.token_ids)


def test_limits_inside_a_branch():
    for count in range(1, 20):
        out = engine().generate(PROMPT, max_tokens=count)
        assert out.token_ids == plain()[:count] and out.finish_reason == "length"
    for room in range(1, 20):
        out = engine(max_position_embeddings=len(PROMPT) + room).generate(PROMPT, max_tokens=48)
        assert out.token_ids == plain()[:room] and out.finish_reason == "length"


def test_after_every_step_the_cache_is_that_of_a_fresh_prompt():
    under = engine()
    sequence = under.start(PROMPT, Sampling(max_tokens=48))
    for _ in steps(under, sequence):
        check_cache(under, sequence)
    assert sequence.accepted


@pytest.mark.parametrize("policy", POLICIES)
def test_rejected_rows_are_out_of_reach(policy):
    under = engine(policy)
    sequence = under.start(PROMPT, Sampling(max_tokens=48))
    for _ in steps(under, sequence):
        poison(sequence.cache, under.stack.spec.num_layers)
    assert sequence.output == plain(policy)


def test_a_second_turn_and_a_fork_go_on():
    under = engine()
    first = under.start(PROMPT, Sampling(max_tokens=20))
    list(under.run([first]))
    turn = [*first.tokens, *PROMPT[:9]]
    again = under.start(turn, Sampling(max_tokens=48), reuse=first)
    twin = again.fork()
    for sequence in (again, twin):
        list(under.run([sequence]))
        assert sequence.output == plain(prompt=tuple(turn))
