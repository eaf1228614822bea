"""What sparse layers read in place of what they leave out: means of blocks of the tokens that are committed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guesses import Guesses
from springtide.attention import parse_policy
from springtide.attention.policy import STEP, Layer, Policy, dense, read
from springtide.attention.tidal import Tidal
from springtide.drafting.lookup import Lookup
from springtide.engine import loop
from springtide.engine.engine import Engine
from springtide.engine.loop import Loop
from springtide.errors import SpringtideError
from springtide.model import stack
from springtide.options import Share, amount
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.sampling import Sampling
from springtide.rows.segment import PREFIX, Segment
from stepping import holding, steps
from tiny import random_tokens, tiny

TEXT = random_tokens(400, seed=21)
LAYERS = "full=0,select=1,reselect=3"  # of 6, so that layers 2, 4 and 5 are sparse
MAP = ((2, (1, 0)), (4, (1, 1)), (5, (0, 0)))
FEW = f"tidal:budget=20,{LAYERS}"  # 3 means: blocks of 128 tokens from 256 tokens on
SHARE = f"tidal:budget=20%,{LAYERS}"
POLICIES = {
    "few": FEW,
    "two": f"tidal:budget=20,means=2,{LAYERS}",  # blocks of 128 tokens from 192 tokens on, of 256 from 384 on
    "one": f"tidal:budget=5,sinks=0,recent=0,{LAYERS}",
    "many": f"tidal:budget=30,means=60%,{LAYERS}",
    "a share": SHARE,
    "a small share": f"tidal:budget=10%,means=10%,{LAYERS}",
    "corrected": f"{FEW},correct=45",
    "seldom corrected": f"{SHARE},correct=130",
    "a set for each head": f"{FEW},heads=kv,pool=mean",
    "a map": Tidal(budget=20, full=(0,), select=1, reselect=(3,), heads="map", map=MAP),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def engine_of(policy, name="qwen3", dtype=torch.float64, **overrides):
    return Engine(tiny(name, dtype, **{"num_hidden_layers": 6, **overrides}), policy=policy)


@cache
def plain(policy, length, count, name="qwen3", **options):
    """Output without a drafter after the first tokens of ``TEXT``."""
    return engine_of(policy, name, **options).generate(TEXT[:length], max_tokens=count).token_ids


@cache
def prompt_of(length, name="qwen3", dtype=torch.float64, **overrides):
    """A cache that holds the first tokens of ``TEXT`` as a dense prompt; fork it to write."""
    engine = engine_of("dense", name, dtype, **overrides)
    cache = engine.stack.new_cache()
    engine.stack.forward([Segment.chain(cache, 0, TEXT[:length], "prompt", Policy())])
    cache.commit(0, range(length), exact=True)
    return cache


def rows_after(engine, cache, tokens, parents=None, state=None):
    """Decode ``tokens`` (a chain, unless ``parents`` say otherwise) on a copy of ``cache``: hidden rows, segment."""
    parents = list(range(-1, len(tokens) - 1)) if parents is None else parents
    state = engine.policy.new_state() if state is None else state
    segment = Segment(cache.fork(), cache.length, tokens, parents, "decode", engine.policy, state)
    return engine.stack.forward([segment])[0], segment


def crop(request, length):
    """Forget what is cached of the tokens from position ``length`` on."""
    request.cache.crop(length)
    request.state.crop(length)


def copied(state):
    """A state that can be used while the other stays as it is."""
    return replace(state, means=dict(state.means))


def blocks_of(policy, prefix):
    """How many blocks there should be, and of how many tokens."""
    most = amount(policy.means, policy.budget_at(prefix + 1))
    tokens = next(STEP << i for i in count() if most == 0 or prefix // (STEP << i) <= most)
    return prefix // tokens if most else 0, tokens


@dataclass
class Read:
    """What a sparse layer read."""

    layer: int
    prefix: int
    selected: int
    blocks: int
    tokens: int


@pytest.fixture
def reads(monkeypatch):
    """Every sparse read, each of which is checked against the cache as it then is."""
    met, gathered = [], stack.gathered

    def watched(layer, q, segment, slots):
        means, selected = slots.means, slots.index.shape[2]
        met.append(Read(layer.index, segment.prefix, selected, *((means.count, means.tokens) if means else (0, STEP))))
        if means is not None:
            assert means.count * means.tokens <= segment.prefix
            known = segment.cache.read(layer.index, 0, means.count * means.tokens)
            for got, x in zip((means.keys, means.values), known, strict=True):
                expected = x.unflatten(1, (-1, means.tokens)).mean(2)
                torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
        return gathered(layer, q, segment, slots)

    monkeypatch.setattr(stack, "gathered", watched)
    return met


# Which blocks there are


def check_blocks(engine, reads):
    """Committed tokens alone, in blocks that are few enough, inside the budget."""
    assert {read.layer for read in reads} == {2, 4, 5}
    for one in reads:
        assert (one.blocks, one.tokens) == blocks_of(engine.policy, one.prefix)
        assert one.selected + one.blocks == engine.policy.budget_at(one.prefix + 1)


@every_policy
def test_means_are_those_of_the_cache(policy, reads):
    engine = engine_of(policy)
    engine.score(TEXT[:320], 30)
    check_blocks(engine, reads)
    assert {read.blocks for read in reads} >= {0, 1} and reads[-1].blocks > 0


@pytest.mark.parametrize(
    ("policy", "length", "end"), [("two", 40, 270), ("a small share", 63, 200), ("seldom corrected", 100, 280)]
)
def test_means_are_those_of_the_cache_at_every_step(policy, length, end, reads):
    """Past the ends of blocks, a doubling of their length and refreshes."""
    engine = engine_of(POLICIES[policy])
    engine.generate(TEXT[:length], max_tokens=end - length)
    check_blocks(engine, reads)
    assert {read.prefix for read in reads} >= {*range(length, length + 100)}


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(st.integers(1, 3000), st.integers(1, 1000).map(lambda x: Share(x / 10))),
    st.one_of(st.integers(0, 300), st.integers(0, 1000).map(lambda x: Share(x / 10))),
    st.integers(0, 10**6),
    st.sampled_from([None, 30, 100]),
)
def test_what_is_read_stays_within_the_headroom(budget, means, length, correct):
    """As short as their number allows, and the same for all rows until the next block is full."""
    policy = Tidal(budget=budget, means=means, correct=correct)
    segments = [Segment.chain(Cache(Pool(1)), length + i, [0], "decode", Policy()) for i in range(STEP)]
    found = [(policy.blocks(segment), policy.tokens(segment)) for segment in segments]
    if amount(means, policy.budget_at(length + 1)) < policy.budget_at(length + 1):
        assert found[0][0] == blocks_of(policy, length)
    headroom = policy.headroom(holding(length))
    headroom = STEP if headroom is None else headroom
    assert headroom >= 1 and len(set(found[:headroom])) == 1


@pytest.mark.parametrize(("length", "left"), [(10, 54), (63, 1), (64, 64), (127, 1), (130, 62)])
def test_only_with_means_there_is_a_limit(length, left):
    for means in (1, Share(15), Share(0.1)):
        policy = Tidal(budget=9, means=means)
        assert policy.stepwise and policy.headroom(holding(length)) == left
    for means in (0, Share(0)):
        policy = Tidal(budget=9, means=means)
        assert not policy.stepwise and policy.headroom(holding(length)) is None
        growing = Tidal(budget=Share(9), means=means)
        assert growing.headroom(holding(length)) == left
    policy = Tidal(budget=9, means=1, correct=20)
    assert policy.headroom(holding(length, length - 3)) == min(left, 17)


def test_short_contexts_have_none(reads):
    engine = engine_of(FEW)
    scores = engine.score(TEXT[:65], 30)
    assert {(read.selected, read.blocks) for read in reads} == {(20, 0)}
    assert torch.equal(scores, engine.using(f"{FEW},means=0").score(TEXT[:65], 30))
    assert not torch.equal(engine.score(TEXT[:70], 30), engine.using(f"{FEW},means=0").score(TEXT[:70], 30))


@pytest.mark.parametrize("means", ["0", "0%"])
@pytest.mark.parametrize("policy", [FEW, SHARE])
def test_none_may_be_wanted(policy, means, reads):
    """The whole budget is selected then, and nothing is kept."""
    engine = engine_of(f"{policy},means={means}")
    sequence = engine.start(TEXT[:140], Sampling(max_tokens=20))
    list(engine.run([sequence]))
    assert sequence.state.means == {}
    assert reads and all(
        (read.selected, read.blocks) == (engine.policy.budget_at(read.prefix + 1), 0) for read in reads
    )


@pytest.mark.parametrize("budget", ["400", "100%"])
@pytest.mark.parametrize("means", ["0", "7", "15%", "100%"])
def test_a_budget_of_the_context_is_dense(budget, means, reads):
    sparse = engine_of(f"tidal:budget={budget},means={means},{LAYERS}")
    full = sparse.using("dense")
    torch.testing.assert_close(sparse.score(TEXT[:200], 100), full.score(TEXT[:200], 100), atol=1e-6, rtol=0)
    assert sparse.generate(TEXT[:100], max_tokens=60).token_ids == plain("dense", 100, 60)
    assert reads == []


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ("-1", "means is -1, but it must be at least 0"),
        ("120%", "means is 120%, but a share must be at least 0% and at most 100%"),
        ("-3%", "means is -3%, but a share must be at least 0%"),
        ("x", "means is 'x', but it must be a whole number, or a share such as 5%"),
        ("0.5", "means is '0.5', but it must be a whole number, or a share"),
    ],
)
def test_means_that_are_none(means, message):
    with pytest.raises(SpringtideError, match=f"tidal: {message}") as caught:
        engine_of(f"{FEW},means={means}")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_means_in_text():
    assert parse_policy("tidal:means=12").means == 12 and parse_policy("tidal:means=2.5%").means == Share(2.5)
    assert Tidal().means == Share(15)


# The cache changes beneath them


def known_at(engine, length):
    """A sequence that has decoded up to ``length`` tokens of ``TEXT``, with the means of before."""
    sequence = engine.start([*TEXT[: length + 1]], Sampling(max_tokens=1), prefill=10)
    passes = Loop(engine.stack, engine.eos)
    while sequence.cache.length < length:
        passes.step([sequence])
    return sequence


@pytest.mark.parametrize(("policy", "every"), [(FEW, 1), (SHARE, 30), (FEW, 64), (SHARE, 100)])
def test_after_a_correction_rows_are_as_with_a_state_that_is_new(policy, every):
    engine = engine_of(f"{policy},correct={every}")
    sequence, met, exact = engine.start(TEXT[:40], Sampling(max_tokens=200)), 0, 40
    for _ in steps(engine, sequence):
        if sequence.cache.exact > exact and sequence.finish_reason is None:
            exact, met = sequence.cache.exact, met + 1
            got, _ = rows_after(engine, sequence.cache, [5, 6], state=copied(sequence.state))
            fresh, _ = rows_after(engine, sequence.cache, [5, 6])
            torch.testing.assert_close(got, fresh, atol=1e-10, rtol=0)
    assert met >= 199 // (every + 1) - 1


@pytest.mark.parametrize("policy", [FEW, SHARE, POLICIES["two"]])
@pytest.mark.parametrize("length", [50, 64, 100, 127, 128, 200, 254])
def test_after_a_crop_rows_are_as_with_a_state_that_is_new(policy, length):
    """However little is left, and however far it goes on, with other tokens."""
    engine = engine_of(policy)
    sequence = known_at(engine, 255)
    crop(sequence, length)
    sequence.tokens = [*TEXT[:length], *random_tokens(150, seed=5)]
    passes = Loop(engine.stack, engine.eos)
    while sequence.cache.length < len(sequence.tokens) - 1:
        got, _ = rows_after(engine, sequence.cache, [5, 6], [PREFIX, PREFIX], state=copied(sequence.state))
        fresh, _ = rows_after(engine, sequence.cache, [5, 6], [PREFIX, PREFIX])
        torch.testing.assert_close(got, fresh, atol=1e-10, rtol=0)
        passes.step([sequence])


@torch.inference_mode()
def test_after_a_crop_that_is_made_up_with_no_pass_between():
    engine = engine_of(FEW)
    sequence = known_at(engine, 150)
    crop(sequence, 70)
    other = known_at(engine_of("dense"), 150)
    for layer in range(6):
        sequence.cache.write(layer, 70, *(-x for x in other.cache.read(layer, 70, 150)))
    sequence.cache.commit(70, range(80), exact=True)
    got, _ = rows_after(engine, sequence.cache, [5], state=copied(sequence.state))
    torch.testing.assert_close(got, rows_after(engine, sequence.cache, [5])[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("length", [60, 100])
def test_forks_go_their_own_ways(length):
    """With other tokens each, over the end of a block."""
    engine = engine_of(FEW)
    sequences = [known_at(engine, length)]
    sequences.append(sequences[0].fork())
    for seed, sequence in enumerate(sequences):
        sequence.tokens = [*sequence.tokens[: length + 1], *random_tokens(70, seed=30 + seed)]
    passes = Loop(engine.stack, engine.eos)
    while sequences[0].cache.length < length + 70:
        passes.step(sequences)
        for sequence in sequences:
            got, _ = rows_after(engine, sequence.cache, [5], state=copied(sequence.state))
            torch.testing.assert_close(got, rows_after(engine, sequence.cache, [5])[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("policy", [FEW, f"{SHARE},correct=50"])
def test_a_second_turn_is_as_in_a_cache_that_was_never_longer(policy):
    """What is reused of a conversation keeps no means of what is not."""
    engine = engine_of(policy)
    first = engine.start(TEXT[:100], Sampling(max_tokens=110))
    list(engine.run([first]))
    conversation = [*first.tokens[:150], *TEXT[300:330]]
    second = engine.start(conversation, Sampling(max_tokens=2), reuse=first)
    list(engine.run([second]))
    got, _ = rows_after(engine, second.cache, [5], state=copied(second.state))
    torch.testing.assert_close(got, rows_after(engine, second.cache, [5])[0], atol=1e-10, rtol=0)


def test_states_have_their_own():
    policy = parse_policy(FEW)
    one, two = policy.new_state(), policy.new_state()
    assert one.means is not two.means


# What equals what


@every_policy
@pytest.mark.parametrize("kind", ["oracle", "mixed"])
def test_greedy_is_as_without_a_drafter(policy, kind):
    """Over the ends of many blocks, and over a doubling of their length."""
    expected = plain(policy, 55, 210)
    drafter = Guesses([TEXT[:55] + expected], kind, size=12)
    assert engine_of(policy).drafting(drafter).generate(TEXT[:55], max_tokens=210).token_ids == expected
    assert kind != "oracle" or drafter.calls <= 210 / 4


@pytest.mark.parametrize("drafter", [Lookup(), Guesses([], "wrong"), Guesses([], "random", size=20)], ids=str)
@pytest.mark.parametrize("policy", [FEW, f"{SHARE},correct=45"])
def test_greedy_is_as_without_a_drafter_that_knows_nothing(policy, drafter):
    """The same prompt twice, for something to look up."""
    engine = engine_of(policy)
    engine.adaptive = False
    prompt = TEXT[:50] * 2
    expected = engine.generate(prompt, max_tokens=100).token_ids
    assert engine.drafting(drafter).generate(prompt, max_tokens=100).token_ids == expected


@pytest.mark.parametrize("policy", [POLICIES["two"], f"{SHARE},correct=45"])
def test_sampled_output_is_as_without_a_drafter(policy):
    options = {"max_tokens": 200, "temperature": 1.0, "seed": 4}
    engine = engine_of(policy)
    expected = engine.generate(TEXT[:60], **options).token_ids
    for kind in ("oracle", "mixed"):
        drafted = engine.drafting(Guesses([TEXT[:60] + expected], kind))
        assert drafted.generate(TEXT[:60], **options).token_ids == expected


@pytest.mark.parametrize("budget", ["70", "100", "95%", "99%"])
def test_greedy_is_as_without_a_drafter_where_the_context_outgrows_the_budget(budget):
    """A draft may reach beyond the tokens that the budget holds."""
    policy = f"tidal:budget={budget},{LAYERS}"
    expected = plain(policy, 55, 90)
    for kind, seed in (("oracle", 0), ("mixed", 0), ("mixed", 1), ("wrong", 0)):
        engine = engine_of(policy).drafting(Guesses([TEXT[:55] + expected], kind, seed, size=12))
        assert engine.generate(TEXT[:55], max_tokens=90).token_ids == expected


@pytest.mark.parametrize("policy", [FEW, f"{SHARE},correct=45", POLICIES["a map"]], ids=str)
def test_sequences_of_a_batch_are_each_as_alone(policy):
    prompts = [TEXT[:length] for length in (3, 60, 100, 180)]
    alone = [plain(policy, len(prompt), 80) for prompt in prompts]
    assert [out.token_ids for out in engine_of(policy).generate(prompts, max_tokens=80)] == alone
    drafter = Guesses([prompt + output for prompt, output in zip(prompts, alone, strict=True)], "mixed", size=12)
    drafted = engine_of(policy).drafting(drafter).generate(prompts, max_tokens=80)
    assert [out.token_ids for out in drafted] == alone


@pytest.mark.parametrize(
    "policy",
    [*list(POLICIES.values())[:8], f"{FEW},rows=root", f"tidal:budget=100,{LAYERS}", f"tidal:budget=97%,{LAYERS}"],
)
def test_given_rows_in_one_pass_are_as_one_at_a_time(policy, monkeypatch):
    engine = engine_of(policy)
    expected = engine.score(TEXT[:270], 60)
    monkeypatch.setattr(loop, "GIVEN_ROWS", 1)
    torch.testing.assert_close(engine.score(TEXT[:270], 60), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", [FEW, POLICIES["many"], POLICIES["a map"]], ids=str)
@settings(deadline=None, max_examples=12)
@given(
    picks=st.lists(st.tuples(st.integers(0, 9), st.integers(3, 96)), max_size=7),
    prefix=st.sampled_from([64, 70, 128, 184, 260]),
)
def test_rows_of_a_tree_are_as_without_a_tree(policy, picks, prefix):
    """``picks`` are a parent and a token for each node."""
    engine, cache = engine_of(policy), prompt_of(prefix)
    tokens = [TEXT[prefix], *(token for _, token in picks)]
    parents = [PREFIX, *(parent % (node + 1) for node, (parent, _) in enumerate(picks))]
    tree, _ = rows_after(engine, cache, tokens, parents)

    def check(node, cache):
        alone, segment = rows_after(engine, cache, [tokens[node]])
        torch.testing.assert_close(tree[node], alone[0], atol=1e-10, rtol=1e-10)
        segment.cache.commit(segment.prefix, [0], exact=False)
        for child in (i for i, parent in enumerate(parents) if parent == node):
            check(child, segment.cache)

    check(0, cache)


def test_a_root_selects_for_the_tree_and_all_rows_read_the_means(reads):
    engine, cache = engine_of(f"{FEW},rows=root"), prompt_of(200)
    rows, segment = rows_after(engine, cache, [50, 51, 52], [PREFIX, 0, 0])
    assert {(read.selected, read.blocks) for read in reads} == {(17 + 2, 3)}
    assert segment.state.selected[0, :, 17:].tolist() == [[201, 202]] * 2
    alone, _ = rows_after(engine, cache, [50])
    torch.testing.assert_close(rows[0], alone[0], atol=1e-10, rtol=0)
    without, _ = rows_after(engine.using(f"{FEW},rows=root,means=0"), cache, [50, 51, 52], [PREFIX, 0, 0])
    assert not any(torch.allclose(a, b) for a, b in zip(rows, without, strict=True))


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2", "qwen2"])
def test_sliding_layers_have_none(name, reads):
    """With a soft cap too."""
    policy, deep = "tidal:budget=20,layout=paper", {"num_hidden_layers": 8}
    expected = plain(policy, 100, 170, name, **deep)
    assert {read.layer for read in reads} == {7} and {(r.blocks, r.tokens) for r in reads} >= {(1, 64), (2, 128)}
    engine = engine_of(policy, name, **deep).drafting(Guesses([TEXT[:100] + expected], "mixed", size=12))
    assert engine.generate(TEXT[:100], max_tokens=170).token_ids == expected
    engine, cache = engine_of(policy, name, **deep), prompt_of(130, name, **deep)
    hidden, _ = rows_after(engine, cache, [7])
    assert not torch.allclose(hidden, rows_after(engine.using(f"{policy},means=0"), cache, [7])[0])


# What they cost and what they bring

LAYER_BYTES = 2 * 8 * 4  # one token's key in one layer: 2 KV heads of 8 fp32 numbers


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("policy", "budget"), [(FEW, 20), (SHARE, 52), (POLICIES["a map"], 20)], ids=str)
def test_bytes_read(policy, budget, rows):
    """Every row reads as many slots and means as its budget: what the means save of the cache costs as much again."""
    engine = engine_of(policy, dtype=torch.float32)
    _, segment = rows_after(engine, prompt_of(200, dtype=torch.float32), [5] * rows)
    tokens = 3 * 2 * (200 + rows) + 2 * (200 + rows) + 3 * 2 * budget * rows
    assert segment.bytes_read == tokens * LAYER_BYTES


KV_HEADS, GROUP, HEAD_DIM = 2, 3, 8


def clustered(seed, spread, prefix=650):
    """Queries that want many tokens a little, whose keys and values are alike in each block of 64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slots = normal(2, KV_HEADS, -(-prefix // 64), HEAD_DIM).repeat_interleave(64, 2)[:, :, :prefix]
    slots = torch.cat([slots, normal(2, KV_HEADS, 1, HEAD_DIM)], 2)
    cache = Cache(Pool(1))
    cache.write(0, 0, *slots + spread * normal(*slots.shape))
    return normal(1, KV_HEADS * GROUP, HEAD_DIM), Segment(cache, prefix, [0], [PREFIX], "decode", Policy())


def error(means, seed, spread, budget=64):
    """How far a layer that selects for itself is from dense attention."""
    q, segment = clustered(seed, spread)
    policy, layer = Tidal(budget=budget, means=means, full=(), select=0, reselect=()), Layer(0, 0.3)
    segment.state = policy.new_state()
    out = read(layer, q, segment, policy.sparse(layer, segment, policy.choose(layer, q, segment)))
    return (out - dense(layer, q, segment)).norm()


@pytest.mark.parametrize(("spread", "most"), [(0.1, 0.5), (0.5, 0.6), (1.0, 0.8)])
def test_means_bring_attention_closer_to_dense(spread, most):
    """Where most of what is wanted is not selected."""
    with_means, without = (sum(error(means, seed, spread) for seed in range(40)) for means in (Share(20), 0))
    assert with_means < most * without


def test_no_spread_and_nothing_selected_is_dense():
    """But for the row itself, which each block's mean leaves out: then blocks are all that there is to know."""
    q, segment = clustered(0, 0.0, prefix=640)
    policy, layer = Tidal(budget=11, means=10), Layer(0, 0.3)
    segment.state = policy.new_state()
    own = torch.full((1, KV_HEADS, 1), 640)
    got = read(layer, q, segment, policy.sparse(layer, segment, own))
    torch.testing.assert_close(got, dense(layer, q, segment), atol=1e-12, rtol=0)
