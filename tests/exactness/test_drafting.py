"""Whatever a drafter proposes, the output is the one without it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guesses import KINDS, Guesses
from springtide.attention.policy import Policy
from springtide.attention.tidal import Tidal
from springtide.engine.engine import Engine
from springtide.kernels import native
from springtide.options import Share
from springtide.rows.sampling import Sampling
from stepping import check_cache, poison, steps
from tiny import random_tokens, tiny

PROMPT, LONG = random_tokens(29), random_tokens(55, seed=5)
TIDAL = "tidal:budget=7,full=0,select=1"
POLICIES = {
    "dense": "dense",
    "tidal": TIDAL,
    "tidal with a set for each head": f"{TIDAL},heads=kv,pool=mean",
    "tidal with a map between heads": Tidal(
        budget=7, full=(0,), select=1, reselect=(), heads="map", map=((2, (1, 0)), (3, (1, 1)))
    ),
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


# Greedy


@every_policy
@every_kind
def test_greedy_is_as_without_a_drafter(policy, kind):
    expected = plain(policy)
    drafter = Guesses([PROMPT + expected], kind)
    assert Engine(model(), policy=policy, drafter=drafter).generate(PROMPT, max_tokens=32).token_ids == expected
    if kind == "oracle":
        assert drafter.calls <= 32 / 4, "right guesses are accepted"
    if kind == "wrong" and policy != POLICIES["tidal with corrections"]:
        assert drafter.calls == 31, "and wrong ones are not"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(POLICIES.values())), st.integers(0, 10**6), st.integers(1, 20))
def test_greedy_is_as_without_a_drafter_for_any_tree(policy, seed, size):
    expected = plain(policy)[:16]
    drafter = Guesses([PROMPT + plain(policy)], "mixed", seed, size)
    assert Engine(model(), policy=policy, drafter=drafter).generate(PROMPT, max_tokens=16).token_ids == expected


GROWING = {
    "tidal": "tidal:budget=20%,full=0,select=1",
    "tidal with corrections": "tidal:budget=20%,full=0,select=1,correct=9",
    "tidal with a map between heads": replace(POLICIES["tidal with a map between heads"], budget=Share(10)),
    "oracle": "oracle:budget=10%,skip=1",
    "streaming": "streaming:budget=10%",
}


@pytest.mark.parametrize("policy", GROWING.values(), ids=GROWING.keys())
@pytest.mark.parametrize("kind", ["oracle", "mixed", "random"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_as_without_a_drafter_while_the_budget_grows(policy, kind, sampling):
    """After 64 tokens and after 128, in the middle of what is drafted."""
    expected = plain(policy, prompt=tuple(LONG), count=80, **sampling)
    for seed, size in ((0, 8), (1, 30)):
        drafter = Guesses([LONG + expected], kind, seed, size)
        engine = Engine(model(), policy=policy, drafter=drafter)
        assert engine.generate(LONG, max_tokens=80, **sampling).token_ids == expected
        assert kind != "oracle" or drafter.calls <= 80 / 3


@pytest.mark.parametrize("policy", GROWING.values(), ids=GROWING.keys())
def test_a_drafted_batch_is_each_alone_while_budgets_grow(policy):
    prompts = [LONG[:length] for length in (48, 55)]
    alone = [plain(policy, prompt=tuple(prompt), count=80) for prompt in prompts]
    truths = [prompt + output for prompt, output in zip(prompts, alone, strict=True)]
    engine = Engine(model(), policy=policy, drafter=Guesses(truths, "mixed", size=14))
    assert [out.token_ids for out in engine.generate(prompts, max_tokens=80)] == alone


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
    assert all(layer.block for layer in engine.stack.fused)
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
        def reads(self, layer, q, segment):
            seen.extend(segment.positions)
            return super().reads(layer, q, segment)

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
        check_cache(engine, sequence)


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
