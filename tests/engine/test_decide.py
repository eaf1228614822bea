"""What a pass gives a request: all cuts are made before anything is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters import VOCAB, Letters
from springtide.attention.policy import Policy
from springtide.drafting.accept import Draft, accept
from springtide.drafting.drafter import Drafter
from springtide.drafting.tree import TokenTree
from springtide.engine.decide import decide
from springtide.engine.request import Decision, Request
from springtide.engine.text import Detokenizer
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.sampling import Sampling, Seen
from springtide.rows.segment import PREFIX, PromptEmbeds

PROMPT, FAR = [1, 2, 3], 1000  # FAR: a context limit that is not met
CHAIN = TokenTree([3, 0, 1, 2, 3], [PREFIX, 0, 1, 2, 3])


def request_of(output=(), embeds=None, letters=True, **options):
    """A request that has generated ``output`` already."""
    sampling = Sampling(**options)
    writer = Detokenizer(Letters(), sampling.stop) if letters else None
    request = Request(list(PROMPT), sampling, Policy(), Drafter(), Cache(Pool(1)), 3, 3, embeds=embeds, writer=writer)
    for token in output:
        request.gain(decided(request, token, tree=TokenTree.single(request.tokens[-1])), 0, 0, 0.0)
    return request


def said(*tokens):
    """Logits by which the target says ``tokens``, one at each node, at any temperature."""
    return 1e3 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).double()


def kept(request, tree, logits):
    """What the target accepts of a tree by its logits at the nodes."""
    return accept([Draft(tree, logits, request.sampling, request.seen)])[0]


def decided(request, *tokens, tree=CHAIN, eos=(), limit=FAR):
    """By a target that says ``tokens``, one at each node."""
    return decide(request, kept(request, tree, said(*tokens)), eos, limit)


# What is accepted


def test_plain_decoding_gives_the_targets_token():
    got = decided(request_of(), 4, tree=TokenTree.single(3))
    assert got == Decision([0], [4], "e", None, accepted=0)


def test_a_draft_that_is_right_gives_a_token_more():
    assert decided(request_of(), 0, 1, 2, 3, 6) == Decision([0, 1, 2, 3, 4], [0, 1, 2, 3, 6], "abcdg", None, 4)


def test_what_follows_a_wrong_token_is_not_kept():
    assert decided(request_of(), 0, 5, 2, 3, 6) == Decision([0, 1], [0, 5], "af", None, accepted=1)


def test_without_a_tokenizer_there_is_no_text():
    assert decided(request_of(letters=False), 0, 1, 5, 0, 0) == Decision([0, 1, 2], [0, 1, 5], "", None, accepted=2)


# Ends


@pytest.mark.parametrize(
    ("end", "path", "accepted"),
    [(0, [0], 1), (2, [0, 1, 2], 3), (3, [0, 1, 2, 3], 4), (6, [0, 1, 2, 3, 4], 4)],
    ids=["the first draft", "a draft", "the last draft", "the targets own"],
)
def test_an_end_of_sequence_is_the_last_token_kept(end, path, accepted):
    got = decided(request_of(), 0, 1, 2, 3, 6, eos={end})
    assert (got.tokens[-1], got.path, got.accepted, got.finish_reason) == (end, path, accepted, "stop")
    assert len(got.tokens) == len(path)
    ignored = decided(request_of(ignore_eos=True), 0, 1, 2, 3, 6, eos={end})
    assert ignored == decided(request_of(), 0, 1, 2, 3, 6)


@pytest.mark.parametrize("room", [1, 2, 4, 5])
@pytest.mark.parametrize("before", [0, 2])
def test_limits_cut_what_was_drafted(room, before):
    """``max_tokens``, or the context's, where vectors may take more positions than tokens."""
    output = [6] * before
    wanted = Decision(list(range(room)), [0, 1, 2, 3, 6][:room], "abcdg"[:room], "length", min(room, 4))
    assert decided(request_of(output, max_tokens=before + room), 0, 1, 2, 3, 6) == wanted
    assert decided(request_of(output), 0, 1, 2, 3, 6, limit=3 + before + room) == wanted
    gaps = PromptEmbeds(torch.zeros(2, 4), (0, 5), 9)
    assert decided(request_of(output, gaps), 0, 1, 2, 3, 6, limit=3 + 7 + before + room) == wanted
    longer = decided(request_of(output, max_tokens=before + room + 1), 0, 1, 2, 3, 6)
    assert longer.finish_reason == (None if room == 5 else "length")


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "accepted"),
    [
        ("a", [0], "", 1),
        ("bc", [0, 1, 2], "a", 3),
        ("dg", [0, 1, 2, 3, 6], "abc", 4),
        ("fab", [0, 1], "", 2),
        (("cd", "b"), [0, 1], "a", 2),
        (("abcd", "bc"), [0, 1, 2], "a", 3),
    ],
    ids=str,
)
def test_a_stop_string_ends_with_the_token_that_completes_it(stop, tokens, text, accepted):
    """The output may have begun it; that part was held back."""
    request = request_of([4, 5], stop=stop)
    before = request.text
    got = decided(request, 0, 1, 2, 3, 6)
    assert (got.tokens, got.finish_reason, got.accepted) == (tokens, "stop", accepted)
    assert got.path == list(range(len(tokens)))
    assert request.text == before + got.text == ("e" if stop == "fab" else "ef") + text


def test_what_was_held_back_comes_with_the_last_token():
    request = request_of([4, 0], stop="abx", max_tokens=3)
    assert request.text == "e"
    assert decided(request, 1, tree=TokenTree.single(0)) == Decision([0], [1], "ab", "length", 0)


def test_an_end_in_the_last_token_that_fits_is_a_stop():
    assert decided(request_of(max_tokens=2), 0, 1, 2, 3, 6, eos={1}).finish_reason == "stop"
    assert decided(request_of(max_tokens=2, stop="b"), 0, 1, 2, 3, 6).finish_reason == "stop"
    # What comes behind the limit is no reason.
    assert decided(request_of(max_tokens=2), 0, 1, 2, 3, 6, eos={2}).finish_reason == "length"
    assert decided(request_of(max_tokens=2, stop="bc"), 0, 1, 2, 3, 6).text == "ab"


# All together

some_logits = st.lists(st.lists(st.integers(-20, 20), min_size=VOCAB, max_size=VOCAB), min_size=10, max_size=10)


@settings(deadline=None, max_examples=150)
@given(
    picks=st.lists(st.tuples(st.integers(0, 9), st.integers(0, VOCAB - 1)), max_size=9),
    logits=some_logits,
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.5]),
            "seed": st.integers(0, 99),
            "max_tokens": st.integers(3, 12),
            "stop": st.lists(st.text("abcdefg", min_size=1, max_size=3), max_size=2),
            "ignore_eos": st.booleans(),
        }
    ),
    eos=st.sets(st.integers(0, VOCAB - 1), max_size=2),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    right=st.integers(0, 9),
)
def test_a_tree_gives_what_its_nodes_give_one_at_a_time(picks, logits, options, eos, output, right):
    """``right`` of the nodes hold the token that the target says after the ones before them."""
    table, tree = torch.tensor(logits, dtype=torch.float64) / 4, TokenTree.single(PROMPT[-1])
    options = {**options, "stop": tuple(stop for stop in options["stop"] if stop not in Letters().decode(output))}
    whole, single = (request_of(output, **options) for _ in range(2))
    tree.tokens[0] = whole.tokens[-1]
    history = {0: list(whole.tokens)}
    for number, (pick, token) in enumerate(picks):
        parent = pick % len(tree.tokens)
        if number < right:
            lone = Draft(TokenTree.single(0), table[parent : parent + 1], whole.sampling, Seen(history[parent]))
            token = accept([lone])[0].tokens[0]
        if tree.child(parent, token) is None:
            history[len(tree.tokens)] = [*history[parent], token]
            tree.tokens.append(token)
            tree.parents.append(parent)
    got = decide(whole, kept(whole, tree, table[: len(tree.tokens)]), eos, FAR)

    node, path, text = 0, [], ""
    while node is not None and single.finish_reason is None:
        path.append(node)
        step = decide(single, kept(single, TokenTree.single(single.tokens[-1]), table[node : node + 1]), eos, FAR)
        single.gain(step, 0, 0, 0.0)
        text += step.text
        node = tree.child(node, step.tokens[0])
    tokens = single.output[len(output) :]
    assert (got.path, got.tokens, got.text, got.finish_reason) == (path, tokens, text, single.finish_reason)
    assert got.accepted == len(path) - (node is None)
