"""What sparse policies leave as it is, and what corrections and second turns make exact again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending import (
    ALL_HEADS,
    DEEP,
    GROUP,
    GROWING,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    LONG,
    MAPPED,
    PROMPT,
    SCALE,
    SPARSE,
    TIDAL,
    TREE,
    cached,
    case,
    engine_of,
    every_sparse_policy,
    rows_after,
    seen_by,
)
from springtide.attention.policy import Layer, read
from springtide.attention.tidal import Tidal
from springtide.engine import loop
from springtide.engine.loop import Loop
from springtide.evaluation.recall import Meter
from springtide.options import KVHead, Share
from springtide.rows.sampling import Sampling
from springtide.rows.segment import PREFIX
from stepping import holding
from tiny import random_tokens

# What equals what


@pytest.mark.parametrize(
    "policy",
    [
        f"tidal:budget=64,{LAYERS}",
        f"tidal:budget=64,{LAYERS},full_heads=2.1",
        f"tidal:budget=64,means=0,{LAYERS},full_heads=2.1+4.0",
        "oracle:budget=64",
        "streaming:budget=64",
        "quest:budget=64",
    ],
)
def test_a_budget_of_the_context_is_dense(policy):
    sparse, full = engine_of(policy, dtype=torch.float32), engine_of("dense", dtype=torch.float32)
    assert sparse.generate(PROMPT, max_tokens=24).token_ids == full.generate(PROMPT, max_tokens=24).token_ids
    torch.testing.assert_close(sparse.score(PROMPT, 10), full.score(PROMPT, 10), atol=1e-5, rtol=0)


@every_sparse_policy
def test_a_small_budget_is_not_dense(policy):
    """Or the other tests would show nothing."""
    full = engine_of("dense").score(PROMPT, 20)
    assert (engine_of(policy).score(PROMPT, 20) - full).abs().max() > 1e-2


@every_sparse_policy
@settings(deadline=None, max_examples=12)
@given(picks=st.lists(st.tuples(st.integers(0, 9), st.integers(3, 96)), max_size=7), prefix=st.sampled_from([5, 8, 30]))
def test_rows_of_a_tree_are_as_without_a_tree(policy, picks, prefix):
    """Those that can be kept; ``picks`` are a parent and a token for each node."""
    engine = engine_of(policy)
    cache = cached(engine, PROMPT[:prefix])
    tokens = [PROMPT[prefix], *(token for _, token in picks)]
    parents = [PREFIX, *(parent % (node + 1) for node, (parent, _) in enumerate(picks))]
    tree, _ = rows_after(engine, cache, tokens, parents)
    headroom = engine.policy.headroom(holding(prefix))

    def check(node, cache):
        alone, segment = rows_after(engine, cache, [tokens[node]])
        torch.testing.assert_close(tree[node], alone[0], atol=1e-10, rtol=1e-10)
        segment.cache.commit(segment.prefix, [0], exact=False)
        if segment.cache.length - prefix == headroom:
            return
        for child in (i for i, parent in enumerate(parents) if parent == node):
            check(child, segment.cache)

    check(0, cache)


@pytest.mark.parametrize(
    "policy",
    [*SPARSE, f"{TIDAL},correct=7", "dense", f"{TIDAL},rows=root", f"{HEADS},rows=root", "quest:budget=8,page=4"],
)
def test_given_rows_in_one_pass_are_as_one_at_a_time(policy, monkeypatch):
    engine = engine_of(policy)
    expected = engine.score(PROMPT, 12)
    monkeypatch.setattr(loop, "GIVEN_ROWS", 1)
    torch.testing.assert_close(engine.score(PROMPT, 12), expected, atol=1e-6, rtol=0)


@every_sparse_policy
def test_later_tokens_and_siblings_change_nothing(policy):
    engine = engine_of(policy)
    cache = cached(engine, PROMPT[:30])
    # Rows 0 - 1 - 2 are a branch; 3 and 4 are its siblings, 5 comes after it.
    parents = [PREFIX, 0, 1, 0, 1, 2]
    rows, before = rows_after(engine, cache, [50, 51, 52, 53, 54, 55], parents)
    others, after = rows_after(engine, cache, [50, 51, 52, 10, 11, 12], parents)
    torch.testing.assert_close(rows[:3], others[:3], atol=1e-12, rtol=0)
    assert not torch.allclose(rows[3:], others[3:])
    if engine.policy.name == "tidal":
        assert torch.equal(before.state.selected[:3], after.state.selected[:3])


# A budget that is a share of the context

SHARES = [
    GROWING,
    f"{GROWING},full_heads=2.0+5.1",
    f"{GROWING},correct=7",
    replace(MAPPED, budget=Share(15)),
    "tidal:budget=20%,recent=3,heads=kv," + LAYERS,
    "oracle:budget=10%",
    "streaming:budget=10%",
    "quest:budget=30%,page=4",
]


@pytest.mark.parametrize("policy", SHARES, ids=str)
def test_given_rows_are_as_one_at_a_time_while_the_budget_grows(policy, monkeypatch):
    engine = engine_of(policy)
    expected = engine.score(LONG, 50)
    monkeypatch.setattr(loop, "GIVEN_ROWS", 1)
    torch.testing.assert_close(engine.score(LONG, 50), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", SHARES, ids=str)
def test_sequences_of_a_batch_are_each_as_alone_while_their_budgets_grow(policy):
    engine = engine_of(policy)
    prompts = [LONG[:length] for length in (50, 60, 124)]
    alone = [engine.generate(prompt, max_tokens=20).token_ids for prompt in prompts]
    assert [out.token_ids for out in engine.generate(prompts, max_tokens=20)] == alone


@pytest.mark.parametrize("name", ["tidal", "oracle", "streaming", "quest"])
def test_the_whole_context_is_dense(name):
    sparse = engine_of(f"{name}:budget=100%" + f",{LAYERS}" * (name == "tidal"))
    full = sparse.using("dense")
    torch.testing.assert_close(sparse.score(LONG, 50), full.score(LONG, 50), atol=1e-6, rtol=0)
    assert sparse.generate(LONG[:55], max_tokens=20).token_ids == full.generate(LONG[:55], max_tokens=20).token_ids


# Single KV heads that are dense


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
@pytest.mark.parametrize(
    "options", ["means=0,budget=9", "heads=kv,budget=9", "rows=root,budget=9", "recent=1,budget=1"]
)
def test_with_all_heads_full_the_model_is_dense(name, options):
    """Soft caps included; the layers of even number slide in gemma2."""
    layers, heads = (LAYERS, ALL_HEADS) if name == "qwen3" else ("full=1,select=3", "full_heads=5.1+5.0+7.0+7.1")
    engine = engine_of("dense", name, num_hidden_layers=6 if name == "qwen3" else 8)
    full, sparse = engine.score(LONG, 40), f"tidal:{options},{layers}"
    torch.testing.assert_close(engine.using(f"{sparse},{heads}").score(LONG, 40), full, atol=1e-6, rtol=0)
    assert (engine.using(sparse).score(LONG, 40) - full).abs().max() > 1e-4
    cache = cached(engine, LONG[:70])
    tree = [50, 51, 52, 53, 54], [PREFIX, 0, 0, 1, 2]
    rows, _ = rows_after(engine.using(f"{sparse},{heads}"), cache, *tree)
    torch.testing.assert_close(rows, rows_after(engine, cache, *tree)[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    full=st.sets(st.integers(0, KV_HEADS - 1)),
    prefix=st.sampled_from([20, 70, 135]),
    parents=st.sampled_from([(PREFIX,), (PREFIX, 0, 1), TREE]),
    means=st.sampled_from([0, Share(15)]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_full_heads_are_dense_and_the_others_read_the_selection(
    dtype, within, seed, full, prefix, parents, means, softcap
):
    q, segment = case(seed, prefix, parents, dtype)
    heads = tuple(KVHead(0, head) for head in sorted(full, reverse=True))
    sparse = Tidal(budget=9, full=(), select=1, reselect=(), means=means)
    policy, layer = replace(sparse, full_heads=(*heads, KVHead(2, 0))), Layer(0, SCALE, softcap)

    def measured(policy):
        segment.state, segment.bytes_read = policy.new_state(), 0
        segment.state.selected = sparse.best(layer, q, segment)
        segment.bytes_read = 0
        return read(layer, q, segment, policy.reads(layer, q, segment)), segment.bytes_read

    (out, bytes_read), (others, few) = measured(policy), measured(sparse)
    keys, values = (x.double() for x in segment.cache.read(0, 0, segment.length))
    for row in range(len(parents)):
        slots = seen_by(segment, row)
        for head in range(KV_HEADS * GROUP):
            expected = others[row, head].double()
            if head // GROUP in full:
                logits = keys[head // GROUP, slots] @ q[row, head].double() * SCALE
                logits = logits if softcap is None else softcap * (logits / softcap).tanh()
                expected = logits.softmax(0) @ values[head // GROUP, slots]
                assert (expected - others[row, head]).abs().max() > 1e-4
            torch.testing.assert_close(out[row, head].double(), expected, atol=within, rtol=within)
    assert bytes_read - few == len(full) * 2 * segment.length * HEAD_DIM * dtype.itemsize


def test_each_full_head_changes_what_a_model_says():
    """Each head counts: every set of them gives another output, and all of them the dense one."""
    engine = engine_of("dense")
    full = engine.score(PROMPT, 20)
    off = []
    for heads in ("", ",full_heads=2.0", ",full_heads=2.1", ",full_heads=2.0+2.1", f",{ALL_HEADS}"):
        off.append(float((engine.using(TIDAL + heads).score(PROMPT, 20) - full).abs().max()))
    assert len({*off}) == len(off) and off[-1] < 1e-6 < 1e-2 < min(off[:-1])


def test_a_meter_counts_full_heads_as_reading_everything():
    engine, meter, without = engine_of(HEADS), Meter(), Meter()
    list(engine.predictions(PROMPT, 20, meter=meter))
    list(engine.using(TIDAL).predictions(PROMPT, 20, meter=without))
    mass = {layer: (found / meter.rows[layer]).tolist() for layer, found in meter.mass.items()}
    assert mass.keys() == {2, 4, 5}
    for layer, head in ((2, 1), (4, 0)):
        assert mass[layer][head] == pytest.approx(1) and mass[layer][1 - head] < 0.99
        assert without.mass[layer][head] / without.rows[layer] < 0.99
        assert meter.top_k[layer] / meter.rows[layer] < 1
    assert max(mass[5]) < 0.99
    whole = Meter()
    list(engine.using(f"{TIDAL},{ALL_HEADS}").predictions(PROMPT, 20, meter=whole))
    for layer in (2, 4, 5):
        assert (whole.mass[layer] / whole.rows[layer]).tolist() == pytest.approx([1, 1])
        assert whole.top_k[layer] / whole.rows[layer] == pytest.approx(1)


# Models with sliding layers: those of even number slide

SLIDING = ["qwen2", "gemma2", "gemma3_text", "cohere2"]


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_stay_as_they_are(name):
    """With every global layer dense, the smallest budget changes nothing."""
    full = engine_of("dense", name, **DEEP)
    sparse = full.using("tidal:budget=1,full=1+3+5,select=7")
    torch.testing.assert_close(sparse.score(PROMPT, 20), full.score(PROMPT, 20), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SLIDING)
def test_global_layers_are_sparse_between_sliding_ones(name):
    engine = engine_of("dense", name, **DEEP)
    sparse = engine.using("tidal:budget=6,layout=paper")
    assert sparse.policy.dense_layers == (1, 3, 5)
    assert (sparse.score(PROMPT, 20) - engine.score(PROMPT, 20)).abs().max() > 1e-4
    expected = sparse.generate(PROMPT, max_tokens=12).token_ids
    assert sparse.generate([PROMPT, PROMPT[:9]], max_tokens=12)[0].token_ids == expected


# Correction


def largest_difference(engine, cache, other):
    """Between the committed keys and values of two caches."""
    assert cache.length == other.length
    pairs = [
        zip(cache.read(layer, 0, cache.length), other.read(layer, 0, cache.length), strict=True)
        for layer in range(engine.stack.spec.num_layers)
    ]
    return max(float((a - b).abs().max()) for pair in pairs for a, b in pair)


def corrections(policy, **options):
    """Generate, and yield the engine and sequence whenever the whole cache was just corrected, but not at first."""
    engine = engine_of(policy, **options)
    sequence = engine.start(PROMPT[:20], Sampling(max_tokens=30))
    passes = Loop(engine.stack, engine.eos)
    while sequence.finish_reason is None:
        passes.step([sequence])
        if sequence.cache.exact == sequence.cache.length > 20:
            yield engine, sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_after_a_correction_the_cache_is_that_of_a_prompt(dtype):
    met = 0
    for engine, sequence in corrections(f"{TIDAL},correct=6", dtype=dtype):
        clean = cached(engine, sequence.tokens[:-1])
        assert largest_difference(engine, sequence.cache, clean) <= (1e-5 if dtype == torch.float32 else 1e-10)
        met += 1
    # 29 tokens are computed after the prompt; each correction takes 6 of them and the one that it computes itself.
    assert met == 29 // 7


def test_without_correction_it_is_not():
    engine = engine_of(TIDAL)
    sequence = engine.start(PROMPT[:20], Sampling(max_tokens=30))
    list(engine.run([sequence]))
    assert largest_difference(engine, sequence.cache, cached(engine, sequence.tokens[:-1])) > 1e-2
    assert sequence.cache.exact == 20


@pytest.mark.parametrize("every", [1, 2, 5])
def test_corrected_answers_are_scored_the_same_in_any_way(every, monkeypatch):
    """Scoring given tokens goes the way that generating them went."""
    engine = engine_of(f"{TIDAL},correct={every}")
    sequence = engine.start(PROMPT[:20], Sampling(max_tokens=20))
    list(engine.run([sequence]))
    logits = torch.cat(list(engine.predictions(sequence.tokens, 20)))
    assert logits.argmax(-1).tolist() == sequence.output


def test_a_correction_gives_the_next_token_of_a_dense_model():
    """It computes the newest token too: with ``correct=1`` that is every second one."""
    corrected, full = engine_of(f"{TIDAL},correct=1").score(PROMPT, 20), engine_of("dense").score(PROMPT, 20)
    torch.testing.assert_close(corrected[::2], full[::2], atol=1e-6, rtol=0)
    assert (corrected[1::2] - full[1::2]).abs().min() > 1e-4


# What a sequence keeps


@pytest.mark.parametrize("policy", [*SPARSE, f"{TIDAL},correct=5", f"{TIDAL},rows=root", "quest:budget=8,page=4"])
def test_sequences_of_a_batch_are_each_as_alone(policy):
    engine = engine_of(policy)
    prompts = [random_tokens(length, seed=length) for length in (3, 25, 12, 40)]
    alone = [engine.generate(prompt, max_tokens=16).token_ids for prompt in prompts]
    assert [out.token_ids for out in engine.generate(prompts, max_tokens=16)] == alone


def test_a_corrected_second_turn_is_one_long_prompt():
    engine = engine_of(f"{TIDAL},correct=9")
    first = engine.start(PROMPT, Sampling(max_tokens=14))
    list(engine.run([first]))
    conversation = [*first.tokens, *random_tokens(11, seed=3)]
    second = engine.start(conversation, Sampling(max_tokens=14), reuse=first)
    assert len(PROMPT) < second.cache.exact == second.cache.length < len(first.tokens) - 1
    for at, _ in enumerate(engine.run([second])):
        if at == 0:
            assert largest_difference(engine, second.cache, cached(engine, conversation)) <= 1e-10
    assert second.output == engine.generate(conversation, max_tokens=14).token_ids


@pytest.mark.parametrize("policy", [TIDAL, "dense", "quest:budget=8,page=4"])
def test_a_second_turn_reads_nothing_that_was_written_sparsely(policy):
    """Whatever policy wrote it, and whichever reads it."""
    engine = engine_of(TIDAL)
    first = engine.start(PROMPT, Sampling(max_tokens=14))
    list(engine.run([first]))
    conversation = [*first.tokens, *random_tokens(11, seed=3)]
    expected = engine.generate(conversation, max_tokens=14, policy=policy).token_ids
    second = engine.start(conversation, Sampling(max_tokens=14), reuse=first, policy=policy)
    assert second.cache.length == len(PROMPT)
    list(engine.run([second]))
    assert second.output == expected


@pytest.mark.parametrize("policy", [TIDAL, f"{TIDAL},correct=5", "dense"])
def test_a_cache_that_knows_more_than_the_prompt_scores_as_none(policy):
    engine = engine_of(policy)
    reader = engine.start(PROMPT, Sampling(max_tokens=3))
    list(engine.run([reader]))
    torch.testing.assert_close(engine.score(PROMPT, 15, reuse=reader), engine.score(PROMPT, 15), atol=1e-6, rtol=0)


def test_a_fork_goes_on_alone():
    engine = engine_of(f"{TIDAL},correct=5")
    whole = engine.start(PROMPT, Sampling(max_tokens=20))
    passes = Loop(engine.stack, engine.eos)
    for _ in range(8):
        passes.step([whole])
    twin = whole.fork()
    for sequence in (whole, twin):
        list(engine.run([sequence]))
    assert twin.output == whole.output == engine.generate(PROMPT, max_tokens=20).token_ids
