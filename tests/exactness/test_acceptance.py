"""What is kept of a draft: exactly what the target says, and, where asked for, what it finds typical."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise, product
from math import exp
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.drafting import accept as module
from springtide.drafting.accept import Accepted, Draft
from springtide.drafting.lookup import Lookup
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.rows.sampling import Place, Sampling, Seen, distribution
from springtide.rows.segment import PREFIX
from statistic import g_test
from stepping import check_cache, steps
from tiny import random_tokens, tiny

VOCAB, DRAWS = 8, 100_000
TABLE = 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
NUCLEUS = {"temperature": 0.8, "top_p": 0.85, "top_k": 6}


@cache
def toy_tree(last, step, size=8):
    """A random tree that depends on what was committed; children of a node differ."""
    random = Random(10 * last + step)
    tree = TokenTree.single(last)
    while len(tree.tokens) < size:
        parent, token = random.randrange(len(tree.tokens)), random.randrange(VOCAB)
        if tree.child(parent, token) is None:
            tree.tokens.append(token)
            tree.parents.append(parent)
    return tree


def trail(tree, node):
    """Nodes from node 0 down to ``node``."""
    return [node] if tree.parents[node] == PREFIX else [*trail(tree, tree.parents[node]), node]


def leaf_paths(tree):
    return [trail(tree, node) for node in range(len(tree.tokens)) if node not in tree.parents]


def logits_for(*tokens):
    """Rows whose largest logits are at ``tokens``."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).double()


def accept(tree, logits, sampling, committed):
    return module.accept([Draft(tree, logits, sampling, Seen(committed))])[0]


# Exact


def accept_resampling(tree, probabilities, random):
    """A biased rule: every path draws anew at each of its rows, and the path that gets furthest wins."""
    best = None
    for path in leaf_paths(tree):
        draws = [random.choices(range(VOCAB), probabilities[node])[0] for node in path]
        hits = 0
        while hits + 1 < len(path) and tree.tokens[path[hits + 1]] == draws[hits]:
            hits += 1
        if best is None or hits + 1 > len(best.path):
            best = Accepted(path[: hits + 1], draws[: hits + 1])
    return best


def toy_strings(rule, draws=DRAWS):
    """How often each string of three tokens comes after token 0; ``rule(trees, histories, draws) -> [Accepted]``."""
    histories = [[0] for _ in range(draws)]
    while short := [draw for draw, history in enumerate(histories) if len(history) < 4]:
        own = [histories[draw] for draw in short]
        trees = [toy_tree(history[-1], len(history)) for history in own]
        for history, accepted in zip(own, rule(trees, own, short), strict=True):
            history += accepted.tokens
    return Counter(tuple(history[1:4]) for history in histories)


def nucleus():
    """Probabilities of the next token, after each token."""
    return distribution(TABLE, [Place(Sampling(**NUCLEUS), Seen())] * VOCAB).exp().tolist()


def p_value(counts):
    step, strings = nucleus(), list(product(range(VOCAB), repeat=3))
    return g_test([counts[string] for string in strings], [step[0][a] * step[a][b] * step[b][c] for a, b, c in strings])


@torch.inference_mode()
def test_accepted_strings_have_the_targets_distribution():
    rows = cache(lambda last, step: TABLE[toy_tree(last, step).tokens])

    def rule(trees, histories, draws):
        return module.accept(
            [
                Draft(tree, rows(history[-1], len(history)), Sampling(**NUCLEUS, seed=draw), Seen(history))
                for tree, history, draw in zip(trees, histories, draws, strict=True)
            ]
        )

    assert p_value(toy_strings(rule)) > 1e-3


def test_drawing_anew_in_every_row_has_not():
    """The check above is able to fail, with a fifth of its draws."""
    random, rows = Random(0), nucleus()

    def rule(trees, *_):
        return [accept_resampling(tree, [rows[token] for token in tree.tokens], random) for tree in trees]

    assert p_value(toy_strings(rule, DRAWS // 5)) < 1e-6


def test_accept_follows_the_targets_own_tokens():
    tree = TokenTree([1, 2, 3, 4, 5, 6], [PREFIX, 0, 0, 2, 2, 4])
    got = accept(tree, logits_for(3, 0, 5, 0, 6, 7), Sampling(), [1])
    assert got == Accepted([0, 2, 4, 5], [3, 5, 6, 7])
    assert accept(tree, logits_for(7, 0, 5, 0, 6, 7), Sampling(), [1]) == Accepted([0], [7])


def accept_padded(tree, logits):
    """A wrong rule: paths are filled up with token 0 to one length, and a token counts as right wherever it is."""
    paths = leaf_paths(tree)
    length = max(map(len, paths))
    rows = torch.tensor([path + [-1] * (length - len(path)) for path in paths])
    tokens = torch.tensor([[tree.tokens[node] for node in path] + [0] * (length - len(path)) for path in paths])
    said = logits.argmax(-1)[rows]
    hits = (tokens[:, 1:] == said[:, :-1]).cumprod(1).sum(1)
    best, most = int(hits.argmax()), int(hits.max())
    return Accepted(rows[best, : most + 1].tolist(), said[best, : most + 1].tolist())


def greedy_strings(rule):
    """Twelve tokens after each one; the toy target often says 0."""
    table = TABLE.clone()
    table[:, 0] += 1.5
    table[0, 0] -= 3
    strings = []
    for first in range(VOCAB):
        history = [first]
        while len(history) < 13:
            tree = toy_tree(history[-1], len(history))
            history += rule(tree, table[tree.tokens], history).tokens
        strings.append(history[:13])
    return strings


def test_a_path_filled_up_with_token_0_is_not_taken_for_a_draft():
    plain = greedy_strings(lambda tree, logits, _: Accepted([0], [int(logits[0].argmax())]))
    assert greedy_strings(lambda tree, logits, history: accept(tree, logits, Sampling(), history)) == plain
    assert greedy_strings(lambda tree, logits, _: accept_padded(tree, logits)) != plain, "the check is able to fail"


def test_a_leaf_padded_with_token_0_is_taken_only_where_the_target_says_0():
    padded = TokenTree([1, 2, 0, 0], [PREFIX, 0, 1, 2])
    assert accept(padded, logits_for(2, 3, 0, 0), Sampling(), [1]) == Accepted([0, 1], [2, 3])
    # The target does say 0: it is a token like any other, and what follows it is the target's too.
    assert accept(padded, logits_for(2, 0, 5, 0), Sampling(), [1]) == Accepted([0, 1, 2], [2, 0, 5])
    unpadded = TokenTree([1, 2], [PREFIX, 0])
    assert accept(unpadded, logits_for(2, 0), Sampling(), [1]) == Accepted([0, 1], [2, 0])


def test_noise_is_that_of_the_position_not_of_the_node():
    flat, options = torch.zeros(2, VOCAB), Sampling(temperature=1.0, seed=9)
    first = accept(TokenTree.single(1), flat[:1], options, [1, 1]).tokens
    second = accept(TokenTree.single(first[0]), flat[:1], options, [1, 1, *first]).tokens
    tree = TokenTree([1, first[0]], [PREFIX, 0])
    assert accept(tree, flat, options, [1, 1]).tokens == first + second


# Typical

TYPICAL = {
    "temperature": {"temperature": 0.8},
    "filtered": {"temperature": 1.2, "top_p": 0.9, "top_k": 6},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.6},
}
every_sampling = pytest.mark.parametrize("options", TYPICAL.values(), ids=TYPICAL.keys())


def judged(logits, sampling, history):
    """Log-probabilities of the next token, and how much of it a typical one has more than."""
    log_probs = distribution(logits[None], [Place(sampling, Seen(history))])[0]
    probs = log_probs.exp().tolist()
    entropy = -sum(p * log_p for p, log_p in zip(probs, log_probs.tolist(), strict=True) if p)
    return log_probs, min(0.09, 0.3 * exp(-entropy))


@every_sampling
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), last=st.integers(0, 7), step=st.integers(0, 60), size=st.integers(1, 16))
def test_the_longest_typical_path_wins(options, seed, last, step, size):
    tree, sampling = toy_tree(last, step, size), Sampling(**options, accept="typical")
    logits = 2 * torch.randn(size, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ways = []
    for node in range(size):
        path, score, history = trail(tree, node), 0.0, [3, 3, last]
        for parent, child in pairwise(path):
            log_probs, least = judged(logits[parent], sampling, history)
            token = tree.tokens[child]
            if log_probs[token].exp() <= least:
                break
            score += float(log_probs[token])
            history.append(token)
        else:
            following = int(judged(logits[node], sampling, history)[0].argmax())
            ways.append((len(path), score, Accepted(path, [*history[3:], following])))
    assert accept(tree, logits, sampling, [3, 3, last]) == max(ways, key=lambda way: way[:2])[2]


def test_without_a_draft_typical_acceptance_is_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.9, -1.0]])
    assert accept(TokenTree.single(3), logits, Sampling(temperature=1.0, accept="typical"), [3]).tokens == [1]
    penalised = Sampling(temperature=1.0, repetition_penalty=1.5, accept="typical")
    assert accept(TokenTree.single(1), logits, penalised, [1]).tokens == [2]


def test_penalties_count_the_path():
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 2.0, 2.0, 2.0]]).double()
    tree = TokenTree([0, 1, 1], [PREFIX, 0, 1])
    logits = torch.cat([logits, logits[1:]])
    free, penalised = (Sampling(temperature=0.5, repetition_penalty=p, accept="typical") for p in (1.0, 10.0))
    assert accept(tree, logits, free, [0]).path == [0, 1, 2]
    assert accept(tree, logits, penalised, [0]) == Accepted([0, 1], [1, 2])


@every_sampling
@pytest.mark.parametrize("policy", ["dense", "tidal:budget=7,full=0,select=1"])
def test_every_token_of_a_typical_output_is_typical_or_the_most_probable(options, policy):
    prompt = random_tokens(29, vocab=7)
    model = tiny("qwen3", torch.float64, vocab_size=7)
    engine, sampling = Engine(model, policy=policy, drafter=Lookup()), Sampling(48, **options, accept="typical")
    sequence = engine.start(prompt, sampling)
    for _ in steps(engine, sequence):
        if policy == "dense":
            check_cache(engine, sequence)
    rows = torch.cat(list(engine.predictions(sequence.tokens, len(prompt))))
    lesser = 0
    for at, logits in enumerate(rows, start=len(prompt)):
        log_probs, least = judged(logits, sampling, sequence.tokens[:at])
        token = sequence.tokens[at]
        assert log_probs[token].exp() > least or token == log_probs.argmax()
        lesser += int(token != log_probs.argmax())
    assert sequence.accepted > lesser > 0, "the output is another one than greedy decoding's"


def test_typical_acceptance_needs_a_temperature():
    with pytest.raises(SpringtideError, match="temperature above 0"):
        Sampling(accept="typical")
    with pytest.raises(SpringtideError, match="exact, typical"):
        Sampling(accept="tipical")
