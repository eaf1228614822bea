"""Whatever a drafter proposes, the output is the one without it."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guesses import KINDS, Guesses
from springtide.attention.policy import Policy
from springtide.drafting.accept import Accepted, accept
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.engine.loop import Loop
from springtide.engine.rows import PREFIX, Segment
from springtide.engine.sampling import Sampling, filtered
from springtide.kernels import native
from statistic import g_test
from tiny import random_tokens, tiny

PROMPT = random_tokens(29)
TIDAL = "tidal:budget=7,full=0,select=1"
POLICIES = {
    "dense": "dense",
    "tidal": TIDAL,
    "tidal that keeps nothing": f"{TIDAL},sinks=0,recent=0",
    "tidal with less budget than is always kept": "tidal:budget=4,full=0,select=1,sinks=3,recent=9",
    "tidal with corrections": f"{TIDAL},correct=5",
    "oracle": "oracle:budget=6,skip=1",
    "streaming": "streaming:budget=6,sinks=2",
    "streaming with less budget than sinks": "streaming:budget=3,sinks=4",
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
every_kind = pytest.mark.parametrize("kind", KINDS)


def model(name="qwen3", **overrides):
    return tiny(name, torch.float64, **overrides)


@cache
def plain(policy, name="qwen3", prompt=tuple(PROMPT), count=32, **options):
    """Output without a drafter."""
    return Engine(model(name), policy=policy).generate(list(prompt), max_tokens=count, **options).token_ids


def steps(engine, sequence):
    """Run a sequence to its end; yields after every pass."""
    loop = Loop(engine.stack, engine.policy, engine.drafter, engine.eos)
    while sequence.finish_reason is None:
        loop.step([sequence])
        yield


def prefilled(engine, tokens):
    """Keys and values of ``tokens`` as a dense prompt, one pair a layer."""
    segment = Segment.chain(engine.stack.new_cache(), 0, tokens, decoding=False, state=None)
    engine.stack.forward([segment], Policy())
    return [segment.cache.read(layer, 0, len(tokens)) for layer in range(engine.stack.spec.num_layers)]


# Greedy


@every_policy
@every_kind
def test_greedy_is_as_without_a_drafter(policy, kind):
    expected = plain(policy)
    drafter = Guesses([PROMPT + expected], kind)
    assert Engine(model(), policy=policy, drafter=drafter).generate(PROMPT, max_tokens=32).token_ids == expected
    if kind == "oracle":
        assert drafter.calls <= 32 / 4, "right guesses are accepted"
    if kind == "wrong" and "correct" not in policy:
        assert drafter.calls == 31, "and wrong ones are not"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(POLICIES.values())), st.integers(0, 10**6), st.integers(1, 20))
def test_greedy_is_as_without_a_drafter_for_any_tree(policy, seed, size):
    expected = plain(policy)[:16]
    drafter = Guesses([PROMPT + plain(policy)], "mixed", seed, size)
    assert Engine(model(), policy=policy, drafter=drafter).generate(PROMPT, max_tokens=16).token_ids == expected


@pytest.mark.parametrize("name", ["mistral", "gemma2", "phi3", "cohere2"])
def test_greedy_is_as_without_a_drafter_under_sliding_windows(name):
    expected = plain("dense", name)
    for kind in ("oracle", "mixed", "random"):
        engine = Engine(model(name), drafter=Guesses([PROMPT + expected], kind, size=14))
        assert engine.generate(PROMPT, max_tokens=32).token_ids == expected


@pytest.mark.parametrize("policy", ["quest:budget=4,page=4,skip=1", f"{TIDAL},rows=root"])
def test_policies_whose_rows_depend_on_each_other_run_with_any_drafter(policy):
    """They promise no equality, but every pass must give a token that the model can give."""
    for kind in KINDS:
        engine = Engine(model(), policy=policy, drafter=Guesses([PROMPT + plain(policy)], kind, size=14))
        sequence = engine.start(PROMPT, Sampling(max_tokens=24))
        for _ in steps(engine, sequence):
            for layer in range(4):
                assert all(x.isfinite().all() for x in sequence.cache.read(layer, 0, sequence.cache.length))
        assert len(sequence.output) == 24


def test_a_root_that_selects_for_all_is_itself_as_without_a_tree():
    expected = plain(f"{TIDAL},rows=root")
    drafter = Guesses([PROMPT + expected], "wrong")
    engine = Engine(model(), policy=f"{TIDAL},rows=root", drafter=drafter)
    assert engine.generate(PROMPT, max_tokens=32).token_ids == expected == plain(TIDAL)


@pytest.mark.parametrize("policy", ["dense", TIDAL])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-4)], ids=str)
def test_in_lower_precision_only_near_ties_are_decided_otherwise(policy, dtype, near):
    """``near``: how far apart, relative to the larger, two logits may be at the first token that differs."""
    engine = Engine(tiny("qwen3", dtype), policy=policy)
    expected = engine.generate(PROMPT, max_tokens=64).token_ids
    for kind in ("oracle", "mixed"):
        drafted = Engine(tiny("qwen3", dtype), policy=policy, drafter=Guesses([PROMPT + expected], kind))
        got = drafted.generate(PROMPT, max_tokens=64).token_ids
        first = next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), None)
        if first is not None:
            *_, logits = engine.predictions(PROMPT + expected[: first + 1], len(PROMPT))
            best, second = logits[-1].topk(2).values
            assert best - second <= near * best.abs()


@pytest.mark.skipif(not native.levels(), reason="the C++ kernels were not built")
@pytest.mark.parametrize("policy", ["dense", TIDAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["oracle", "wrong", "zero"])
def test_fused_layers_give_a_chain_bit_for_bit(policy, dtype, kind):
    """No tolerance, in any dtype: a row's arithmetic is the same alone, in a chain, and beside other sequences."""
    engine = Engine(tiny("qwen3", dtype), policy=policy)
    assert all(engine.stack.fused)
    prompts = [PROMPT, PROMPT[5:], PROMPT[:9]]
    expected = [engine.generate(prompt, max_tokens=64).token_ids for prompt in prompts]
    truths = [prompt + output for prompt, output in zip(prompts, expected, strict=True)]
    drafted = Engine(tiny("qwen3", dtype), policy=policy, drafter=Guesses(truths, kind))
    assert [output.token_ids for output in drafted.generate(prompts, max_tokens=64)] == expected
    assert [output.token_ids for output in engine.generate(prompts, max_tokens=64)] == expected


# Ends


@every_policy
def test_end_of_sequence_inside_an_accepted_branch(policy):
    full = plain(policy)
    at = next(i for i in range(4, len(full)) if full[i] not in full[:i])
    for kind in ("oracle", "mixed"):
        engine = Engine(model(), policy=policy, drafter=Guesses([PROMPT + full], kind))
        engine.eos = frozenset([full[at]])
        sequence = engine.start(PROMPT, Sampling(max_tokens=32))
        list(engine.run([sequence]))
        assert sequence.output == full[: at + 1] and sequence.finish_reason == "stop"
        assert sequence.cache.length == len(sequence.tokens) - 1
        assert engine.generate(PROMPT, max_tokens=32, ignore_eos=True).token_ids == full


@pytest.mark.parametrize("count", range(1, 12))
def test_max_tokens_inside_a_branch(count):
    engine = Engine(model(), drafter=Guesses([PROMPT + plain("dense")], "oracle", size=6))
    out = engine.generate(PROMPT, max_tokens=count)
    assert out.token_ids == plain("dense")[:count] and out.finish_reason == "length"


def test_context_limit_inside_a_branch():
    limit = len(PROMPT) + 13
    short = model(max_position_embeddings=limit)
    seen = []

    class Spy(Policy):
        def attend(self, layer, q, segment):
            seen.extend(segment.positions)
            return super().attend(layer, q, segment)

    engine = Engine(short, policy=Spy(), drafter=Guesses([PROMPT + plain("dense")], "oracle", size=9))
    out = engine.generate(PROMPT, max_tokens=100)
    assert out.token_ids == plain("dense")[:13] and out.finish_reason == "length"
    assert max(seen) < limit


# The cache


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral"])
def test_after_every_step_the_cache_is_that_of_a_fresh_prompt(name):
    engine = Engine(model(name), drafter=Guesses([PROMPT + plain("dense", name)], "mixed"))
    sequence = engine.start(PROMPT, Sampling(max_tokens=32))
    for _ in steps(engine, sequence):
        length = sequence.cache.length
        assert length == len(sequence.tokens) - 1
        for layer, expected in enumerate(prefilled(engine, sequence.tokens[:length])):
            for got, wanted in zip(sequence.cache.read(layer, 0, length), expected, strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


@torch.inference_mode()
def poison(cache, layers):
    """Make everything that is not committed unusable."""
    for layer in range(layers):
        for part in cache.read(layer, cache.length, 10**6):
            part.fill_(torch.nan)


@pytest.mark.parametrize("policy", [*POLICIES.values(), "quest:budget=8,page=4,skip=1"])
def test_rejected_rows_are_out_of_reach(policy):
    def run(spoil):
        engine = Engine(model(), policy=policy, drafter=Guesses([PROMPT + plain(policy)], "mixed"))
        sequence = engine.start(PROMPT, Sampling(max_tokens=32))
        for _ in steps(engine, sequence):
            if spoil:
                poison(sequence.cache, engine.stack.spec.num_layers)
        return sequence.output

    assert run(spoil=True) == run(spoil=False)


# Batches and sampling

SAMPLINGS = {
    "temperature": {"temperature": 0.8, "seed": 1},
    "top-p": {"temperature": 1.0, "top_p": 0.8, "seed": 2},
    "top-k": {"temperature": 1.5, "top_k": 5, "min_p": 0.02, "seed": 3},
    "repetition penalty": {"temperature": 0.7, "repetition_penalty": 1.4, "seed": 4},
    "greedy repetition penalty": {"repetition_penalty": 1.4},
}


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("policy", ["dense", TIDAL, f"{TIDAL},correct=5"])
def test_sampled_output_is_as_without_a_drafter(policy, options):
    expected = plain(policy, **options)
    for kind in ("oracle", "mixed", "random"):
        drafter = Guesses([PROMPT + expected], kind)
        engine = Engine(model(), policy=policy, drafter=drafter)
        assert engine.generate(PROMPT, max_tokens=32, **options).token_ids == expected
        assert kind != "oracle" or drafter.calls <= 32 / 4


def test_a_seed_gives_another_text_than_another_seed():
    assert plain("dense", temperature=1.0, seed=1) != plain("dense", temperature=1.0, seed=2)


@pytest.mark.parametrize("policy", ["dense", f"{TIDAL},correct=5"])
@pytest.mark.parametrize("options", [{}, SAMPLINGS["temperature"]], ids=["greedy", "sampled"])
def test_a_drafted_batch_is_each_alone_without_a_drafter(policy, options):
    prompts = [random_tokens(length, seed=length) for length in (1, 6, 17, 40)]
    alone = [plain(policy, prompt=tuple(prompt), **options) for prompt in prompts]
    truths = [prompt + output for prompt, output in zip(prompts, alone, strict=True)]
    for kind in ("oracle", "mixed"):
        batch = Engine(model(), policy=policy, drafter=Guesses(truths, kind)).generate(
            prompts, max_tokens=32, **options
        )
        assert [out.token_ids for out in batch] == alone


# The rule

VOCAB, DRAWS = 8, 20_000
TABLE = 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@cache
def toy_tree(last, step):
    """A random tree that depends on what was committed; children of a node differ."""
    random = Random(10 * last + step)
    tree = TokenTree.single(last)
    while len(tree.tokens) < 8:
        parent, token = random.randrange(len(tree.tokens)), random.randrange(VOCAB)
        if tree.child(parent, token) is None:
            tree.tokens.append(token)
            tree.parents.append(parent)
    return tree


def accept_resampling(tree, probabilities, random):
    """The biased rule: every path draws anew at each of its rows, and the path that gets furthest wins."""
    best = None
    for leaf in set(range(len(tree.tokens))) - set(tree.parents):
        path = [leaf]
        while tree.parents[path[0]] != PREFIX:
            path.insert(0, tree.parents[path[0]])
        draws = [random.choices(range(VOCAB), probabilities[node])[0] for node in path]
        hits = 0
        while hits + 1 < len(path) and tree.tokens[path[hits + 1]] == draws[hits]:
            hits += 1
        if best is None or hits + 1 > len(best.path):
            best = Accepted(path[: hits + 1], draws[: hits + 1])
    return best


def toy_strings(rule):
    """How often each string of three tokens comes after token 0; ``rule(tree, committed, draw) -> Accepted``."""
    counts = Counter()
    for draw in range(DRAWS):
        history = [0]
        while len(history) < 4:
            history += rule(toy_tree(history[-1], len(history)), history, draw).tokens
        counts[tuple(history[1:4])] += 1
    return counts


def p_value(counts, options):
    step = [filtered(row / options["temperature"], Sampling(**options)).exp().tolist() for row in TABLE]
    strings = list(product(range(VOCAB), repeat=3))
    expected = [step[0][a] * step[a][b] * step[b][c] for a, b, c in strings]
    return g_test([counts[string] for string in strings], expected)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.85, "top_k": 6}], ids=str)
def test_accepted_strings_have_the_targets_distribution(options):
    def rule(tree, committed, draw):
        return accept(tree, TABLE[tree.tokens], Sampling(**options, seed=draw), committed)

    assert p_value(toy_strings(rule), options) > 1e-3


def test_drawing_anew_in_every_row_has_not():
    """The check above is able to fail."""
    random, rows = Random(0), TABLE.softmax(-1).tolist()

    def rule(tree, _, __):
        return accept_resampling(tree, [rows[token] for token in tree.tokens], random)

    assert p_value(toy_strings(rule), {"temperature": 1.0}) < 1e-6


def logits_for(*tokens):
    """Rows whose largest logits are at ``tokens``."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).double()


def test_accept_follows_the_targets_own_tokens():
    tree = TokenTree([1, 2, 3, 4, 5, 6], [PREFIX, 0, 0, 2, 2, 4])
    got = accept(tree, logits_for(3, 0, 5, 0, 6, 7), Sampling(), [1])
    assert got == Accepted([0, 2, 4, 5], [3, 5, 6, 7])
    assert accept(tree, logits_for(7, 0, 5, 0, 6, 7), Sampling(), [1]) == Accepted([0], [7])


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


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 6))
def test_a_limited_tree_has_the_nodes_down_to_that_depth(picks, depth):
    tree = TokenTree(list(range(len(picks) + 1)), [PREFIX, *(pick % (i + 1) for i, pick in enumerate(picks))])

    def trail(of, node):
        """Tokens from node 0 down: they tell the nodes of ``tree`` apart."""
        return (of.tokens[node],) if of.parents[node] == PREFIX else (*trail(of, of.parents[node]), of.tokens[node])

    limited = tree.limited(depth)
    whole = [trail(tree, node) for node in range(len(tree.tokens))]
    assert [trail(limited, node) for node in range(len(limited.tokens))] == [t for t in whole if len(t) <= depth + 1]
