"""What TidalDecode and its baselines read, select, correct and remember."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.attention import parse_policy
from springtide.attention.baselines import Oracle, Quest, Streaming, page_bounds
from springtide.attention.calibration import FILE, VERSION, read_calibration
from springtide.attention.policy import STEP, Layer, Policy, dense, read
from springtide.attention.tidal import NotCalibratedError, Tidal
from springtide.engine import loop
from springtide.engine.engine import Engine
from springtide.engine.loop import Loop
from springtide.errors import SpringtideError
from springtide.evaluation.recall import Meter
from springtide.kernels.reference import keep_first
from springtide.options import KVHead, Share
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.sampling import Sampling
from springtide.rows.segment import PREFIX, Segment
from springtide.rows.spec import ModelSpec
from stepping import holding
from tiny import random_tokens, tiny

PROMPT = random_tokens(40)
LAYERS = "full=0,select=1,reselect=3"  # of 6, so that layers 2, 4 and 5 are sparse
TIDAL = f"tidal:budget=9,{LAYERS}"
MAP = ((2, (1, 0)), (4, (1, 1)), (5, (0, 0)))
MAPPED = Tidal(budget=9, full=(0,), full_heads=(), select=1, reselect=(3,), heads="map", map=MAP)
HEADS = f"{TIDAL},full_heads=2.1+4.0"
ALL_HEADS = "full_heads=2.0+2.1+4.0+4.1+5.0+5.1"
GROWING = f"tidal:budget=30%,recent=20%,{LAYERS}"  # grows after 64 tokens and after 128
SPARSE = [
    TIDAL,
    f"{TIDAL},heads=kv,pool=mean",
    MAPPED,
    GROWING,
    HEADS,
    f"{HEADS},heads=kv,means=0",
    "oracle:budget=9,skip=1",
    "streaming:budget=9,sinks=3",
]
every_sparse_policy = pytest.mark.parametrize("policy", SPARSE, ids=str)


def engine_of(policy, name="qwen3", dtype=torch.float64, **overrides):
    return Engine(tiny(name, dtype, **{"num_hidden_layers": 6, **overrides}), policy=policy)


def rows_after(engine, cache, tokens, parents=None):
    """Decode ``tokens`` (a chain, unless ``parents`` say otherwise) on a copy of ``cache``: hidden rows, segment."""
    parents = list(range(-1, len(tokens) - 1)) if parents is None else parents
    state = engine.policy.new_state()
    segment = Segment(cache.fork(), cache.length, tokens, parents, "decode", engine.policy, state)
    return engine.stack.forward([segment])[0], segment


def cached(engine, tokens):
    """A cache that holds ``tokens`` as a dense prompt."""
    cache = engine.stack.new_cache()
    engine.stack.forward([Segment.chain(cache, 0, tokens, "prompt", Policy())])
    cache.commit(0, range(len(tokens)), exact=True)
    return cache


def largest_difference(engine, cache, other):
    """Between the committed keys and values of two caches."""
    assert cache.length == other.length
    pairs = [
        zip(cache.read(layer, 0, cache.length), other.read(layer, 0, cache.length), strict=True)
        for layer in range(engine.stack.spec.num_layers)
    ]
    return max(float((a - b).abs().max()) for pair in pairs for a, b in pair)


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


def test_a_root_selects_for_the_tree_and_rows_see_their_own_branch_only():
    engine = engine_of(f"{TIDAL},rows=root")
    cache = cached(engine, PROMPT[:30])
    rows, segment = rows_after(engine, cache, [50, 51, 52], [PREFIX, 0, 0])
    alone, single = rows_after(engine, cache, [50])
    torch.testing.assert_close(rows[0], alone[0], atol=1e-10, rtol=0)
    assert torch.equal(segment.state.selected[0, :, :9], single.state.selected[0])
    # The root's choice, and all rows of the tree, of which each sees its ancestors and itself.
    assert torch.equal(segment.state.selected[0], segment.state.selected[2])
    assert segment.state.selected[0, :, 9:].tolist() == [[31, 32]] * 2
    others, _ = rows_after(engine, cache, [50, 60, 52], [PREFIX, 0, 0])
    torch.testing.assert_close(rows[2], others[2], atol=1e-12, rtol=0)


# Selection, on keys and queries made up for it

KV_HEADS, GROUP, HEAD_DIM, SCALE = 2, 3, 8, 0.5


def case(seed, prefix=20, parents=(PREFIX, 0, 1), dtype=torch.float32):
    """Random queries of a segment and the segment, whose keys are in its cache."""
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(Pool(1))
    keys, values = torch.randn(2, KV_HEADS, prefix + len(parents), HEAD_DIM, generator=generator).to(dtype)
    cache.write(0, 0, keys, values)
    q = torch.randn(len(parents), KV_HEADS * GROUP, HEAD_DIM, generator=generator).to(dtype)
    return q, Segment(cache, prefix, [0] * len(parents), list(parents), "decode", Policy())


def seen_by(segment, row):
    """Slots that a row sees, with its own last."""
    branch, node = [], row
    while node != PREFIX:
        branch.insert(0, segment.prefix + node)
        node = segment.parents[node]
    return [*range(segment.prefix), *branch]


TREE = (PREFIX, 0, 0, 1, 1, 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["mean", "max"]), st.sampled_from(["kv", "all"]), st.integers(1, 12))
def test_selection_is_the_highest_pooled_scores(seed, pool, heads, budget):
    q, segment = case(seed, parents=TREE, dtype=torch.float64)
    keys, _ = segment.cache.read(0, 0, segment.length)
    policy = Tidal(budget=budget, sinks=0, recent=0, pool=pool, heads=heads)
    chosen = policy.choose(Layer(0, SCALE), q, segment)
    for row in range(len(TREE)):
        slots = seen_by(segment, row)
        logits = torch.stack([q[row, h] @ keys[h // GROUP, slots].T * SCALE for h in range(KV_HEADS * GROUP)])
        wanted = logits.softmax(-1) if pool == "mean" else logits
        groups = wanted.split(GROUP) if heads == "kv" else [wanted] * KV_HEADS
        for kv_head, group in enumerate(groups):
            pooled = group.mean(0) if pool == "mean" else group.amax(0)
            pooled[-1] = torch.inf
            best = [slots[i] for i in pooled.topk(budget).indices]
            assert chosen[row, kv_head].tolist() == sorted(best)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_the_oracle_selects_by_scores_and_keeps_only_itself(seed, budget):
    q, segment = case(seed, parents=TREE)
    by_scores = Tidal(budget=budget, sinks=0, recent=0, heads="kv", pool="mean").choose(Layer(0, SCALE), q, segment)
    assert torch.equal(Oracle(budget=budget).choose(Layer(0, SCALE), q, segment), by_scores)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_no_budget_is_spent_on_what_a_row_may_not_see(pool):
    """Even when nearly all of its probabilities vanish."""
    q, segment = case(0, prefix=6, parents=(PREFIX, *[0] * 30))
    chosen = Tidal(budget=7, pool=pool, sinks=0, recent=0).choose(Layer(0, 1e4), q, segment)
    for row in range(31):
        assert all(set(slots) <= set(seen_by(segment, row)) for slots in chosen[row].tolist())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["mean", "max"]))
def test_heads_all_gives_every_kv_head_the_same(seed, pool):
    q, segment = case(seed)
    shared = Tidal(budget=6, pool=pool, heads="all", sinks=1, recent=2).choose(Layer(0, SCALE), q, segment)
    assert torch.equal(shared[:, 0], shared[:, 1])


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("heads", ["kv", "all"])
@pytest.mark.parametrize("recent", [0, 8])
def test_a_row_always_keeps_itself_even_as_the_last_choice(pool, heads, recent):
    q, segment = case(0, parents=TREE)
    keys, _ = segment.cache.read(0, 0, segment.length)
    # The row's own key points away from its queries, which all point the same way.
    q = q[:, :1].expand(-1, KV_HEADS * GROUP, -1)
    for row in range(len(TREE)):
        keys[:, segment.prefix + row] = -10 * q[row, 0]
    policy = Tidal(budget=1, pool=pool, heads=heads, recent=recent)
    own = segment.prefix + torch.arange(len(TREE))
    assert torch.equal(policy.choose(Layer(0, SCALE), q, segment), own[:, None, None].expand(-1, KV_HEADS, 1))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 9), st.integers(1, 22))
def test_itself_then_the_newest_then_the_oldest_are_kept(seed, sinks, recent, budget):
    """Inside the budget, in this order, whatever the scores are."""
    q, segment = case(seed, parents=TREE)
    chosen = Tidal(budget=budget, sinks=sinks, recent=recent).choose(Layer(0, SCALE), q, segment)
    for row in range(len(TREE)):
        slots = seen_by(segment, row)
        newest, oldest = slots[::-1][: max(1, recent)], slots[:sinks]
        order = list(dict.fromkeys([*newest, *oldest]))
        for kv_head in range(KV_HEADS):
            got = chosen[row, kv_head].tolist()
            assert set(order[:budget]) <= set(got) and len(set(got)) == budget


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5000), st.integers(1, 5000))
def test_what_is_always_kept_never_ties(seed, sinks, recent):
    """However many there are, fp32 tells them apart."""
    segment = Segment.chain(Cache(Pool(1)), 12_000 + seed % 100, [0], "decode", Policy())
    ranking = keep_first(torch.zeros(1, 1, segment.length), segment.seen(), sinks, recent)
    kept = ranking[ranking > 0]
    assert len(kept) == sinks + recent and len(kept.unique()) == len(kept)


# One set for each KV head, and maps between heads


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_the_identity_map_is_a_set_for_each_head(pool):
    kv = engine_of(f"{TIDAL},heads=kv,pool={pool}")
    same = kv.using(replace(MAPPED, pool=pool, map=tuple((layer, (0, 1)) for layer, _ in MAP)))
    assert torch.equal(same.score(PROMPT, 12), kv.score(PROMPT, 12))
    assert not torch.equal(same.using(replace(MAPPED, pool=pool)).score(PROMPT, 12), kv.score(PROMPT, 12))


@pytest.mark.parametrize("full_heads", [(), (KVHead(2, 1), KVHead(5, 0))])
def test_each_head_reads_the_set_that_the_map_says(full_heads):
    """Of the layer that selected last: layer 1 for layer 2, and layer 3 for layers 4 and 5."""
    read, chosen = {}, {}
    engine = engine_of(replace(MAPPED, full_heads=full_heads))
    choose = Tidal.choose

    def spy(self, layer, q, segment):
        chosen[layer.index] = choose(self, layer, q, segment)
        return chosen[layer.index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tidal, "choose", spy)
        list(
            engine.predictions(PROMPT, 38, meter=lambda layer, q, segment, index, *_: read.update({layer.index: index}))
        )
    assert set(chosen) == {1, 3} and set(read) == {2, 4, 5}
    for layer, sets in MAP:
        selected = chosen[1 if layer == 2 else 3]
        for head, source in enumerate(sets):
            assert torch.equal(read[layer][:, head], selected[:, source])
    assert not torch.equal(chosen[1][:, 0], chosen[1][:, 1])


@pytest.mark.parametrize("heads", ["all", "kv"])
def test_a_map_counts_only_where_it_is_asked_for(heads):
    engine = engine_of(replace(MAPPED, heads=heads))
    assert torch.equal(engine.score(PROMPT, 20), engine_of(f"{TIDAL},heads={heads}").score(PROMPT, 20))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (replace(MAPPED, map=None), "a map that calibration learnt for these layers"),
        (replace(MAPPED, map=MAP[:2]), "for these layers"),
        (replace(MAPPED, map=(*MAP, (3, (0, 1)))), "for these layers"),
        (replace(MAPPED, full=(0, 2)), "for these layers"),
        (replace(MAPPED, map=(*MAP[:2], (5, (0, 1, 1)))), "not for the 2 KV heads of this model"),
        (replace(MAPPED, map=(*MAP[:2], (5, (0,)))), "not for the 2 KV heads"),
        (replace(MAPPED, map=(*MAP[:2], (5, (0, 2)))), "not for the 2 KV heads"),
        (replace(MAPPED, map=(*MAP[:2], (5, (0, -1)))), "not for the 2 KV heads"),
    ],
    ids=str,
)
def test_maps_that_do_not_fit_are_refused(policy, message):
    with pytest.raises(SpringtideError, match=message) as caught:
        engine_of(policy)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_learnt_map_is_for_the_learnt_layers_alone():
    learnt = {"full": [0], "select": [1, 3], "map": {str(layer): list(sets) for layer, sets in MAP}}
    engine = Engine(tiny("qwen3", num_hidden_layers=6), calibration={"version": VERSION, "tidal": learnt})
    for other in ("layout=paper", "full=0,select=1,reselect=2"):
        with pytest.raises(SpringtideError, match="leave out full, select and reselect, or use heads=all"):
            engine.using(f"tidal:budget=9,heads=map,{other}")
    assert engine.using(f"{TIDAL},heads=map").policy == MAPPED


# A budget that is a share of the context

LONG = random_tokens(140, seed=8)
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


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_a_share_is_rounded_up_and_grows_by_steps(length, tenths):
    percent = tenths / 10
    budget = Tidal(budget=Share(percent)).budget_at(length)
    step = -(-length // STEP) * STEP
    assert budget == -(-(tenths * step) // 1000)
    policy = Tidal(budget=Share(percent), full=(0,), select=1, reselect=(), means=0)
    ahead = policy.headroom(holding(length))
    grown = [policy.budget_at(length + more + 1) for more in range(ahead + 1)]
    assert 1 <= ahead <= STEP and len(set(grown[:-1])) == 1
    held = length + ahead == grown[0]  # no more are covered by the budget
    assert percent < 5 or held or grown[-1] > grown[0]
    fixed = Tidal(budget=9, means=0).headroom(holding(length))
    assert fixed == (9 - length if length < 9 else None)


@pytest.mark.parametrize(("context", "budget"), [(63, 20), (64, 39), (127, 39), (128, 58)])
def test_the_budget_is_that_of_the_tokens_there_are(context, budget):
    """With the one that is decoded: 30% of 64, 128 and 192."""
    engine, read = engine_of(f"{GROWING},means=0"), []
    list(engine.predictions(LONG[: context + 2], context, meter=lambda *about: read.append(about[3].shape[-1])))
    assert set(read) == {budget}


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


@pytest.mark.parametrize("name", ["tidal", "oracle", "streaming", "quest"])
@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("0%", "budget is 0%, but a share must be above 0% and at most 100%"),
        ("120%", "budget is 120%, but a share must be above 0% and at most 100%"),
        ("-3%", "budget is -3%, but a share"),
        ("x%", "budget is 'x%', but it must be a whole number, or a share such as 5%"),
        ("nan%", "budget is 'nan%', but it must be a whole number, or a share"),
        ("%", "budget is '%', but it must be a whole number, or a share"),
        ("5%%", "budget is '5%%', but it must be a whole number, or a share"),
        ("0.5", "budget is '0.5', but it must be a whole number, or a share"),
    ],
)
def test_shares_that_are_none(name, share, message):
    layers = f",{LAYERS}" * (name == "tidal")
    with pytest.raises(SpringtideError, match=f"{name}: {message}") as caught:
        engine_of(f"{name}:budget={share}{layers}")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_shares_in_text():
    policy = parse_policy("tidal:budget=2.5%,recent=10%")
    assert (policy.budget, policy.recent) == (Share(2.5), Share(10))
    assert (policy.named_budget, parse_policy("quest:budget=32").named_budget, Policy().named_budget) == (
        "2.5%",
        32,
        None,
    )
    assert parse_policy("tidal", Share(7)).budget == Share(7)
    assert Tidal().recent == Share(25)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 22), st.integers(0, 100))
def test_recent_may_be_a_share_of_the_budget(seed, budget, percent):
    q, segment = case(seed, parents=TREE)
    chosen = Tidal(budget=budget, recent=Share(percent)).choose(Layer(0, SCALE), q, segment)
    same = Tidal(budget=budget, recent=-(-budget * percent // 100)).choose(Layer(0, SCALE), q, segment)
    assert torch.equal(chosen, same)


# The layout


def spec(layers=32, sliding=(), calibration=None):
    windows = tuple(9 if layer in sliding else None for layer in range(layers))
    return ModelSpec(layers, windows, vocab_size=97, context_limit=512, kv_heads=KV_HEADS, calibration=calibration)


CALIBRATION = {"version": VERSION, "tidal": {"full": [0, 1, 4], "select": [2, 9, 17]}}


@pytest.mark.parametrize(
    ("layers", "reselect"), [(3, ()), (4, ()), (12, (5,)), (28, (11,)), (32, (13,)), (36, (15,)), (80, (32,))]
)
@pytest.mark.filterwarnings("error")
def test_the_papers_layers_are_scaled(layers, reselect):
    policy = Tidal(layout="paper").resolve(spec(layers))
    assert (policy.full, policy.select, policy.reselect) == ((0, 1), 2, reselect)


def test_the_papers_layout_counts_only_layers_without_a_window():
    policy = Tidal(layout="paper").resolve(spec(24, sliding=range(0, 24, 2)))
    assert (policy.full, policy.select, policy.reselect) == ((1, 3), 5, (11,))


@pytest.mark.filterwarnings("error")
def test_without_calibration_the_layers_must_be_said():
    for policy in ("tidal", "tidal:budget=5%,heads=map"):
        with pytest.raises(NotCalibratedError, match=r"not calibrated; run `springtide calibrate .*tidal:layout=paper"):
            engine_of(policy)
    assert engine_of("tidal:layout=paper").policy.selecting == (2,)
    assert engine_of(TIDAL).policy.selecting == (1, 3)


@pytest.mark.filterwarnings("error")
def test_a_calibrated_layout_is_used_unless_one_is_given():
    found = spec(calibration=CALIBRATION)
    for policy, layers in (
        (Tidal(), ((0, 1, 4), 2, (9, 17))),
        (Tidal(layout="paper"), ((0, 1), 2, (13,))),
        (Tidal(full=(0,), select=1, reselect=(8,)), ((0,), 1, (8,))),
        (Tidal(select=0), ((), 0, ())),
        (Tidal(select=1, full=(0,)), ((0,), 1, ())),
    ):
        resolved = policy.resolve(found)
        assert (resolved.full, resolved.select, resolved.reselect) == layers
        assert resolved.resolve(found) == resolved


def test_a_calibration_of_an_earlier_version_is_used_with_a_warning():
    old = spec(calibration={"tidal": CALIBRATION["tidal"]})
    with pytest.warns(UserWarning, match="springtide.json is of an earlier version.*`springtide calibrate` again"):
        policy = Tidal().resolve(old)
    assert policy == Tidal().resolve(spec(calibration=CALIBRATION))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tidal(layout="paper").resolve(old)


@pytest.mark.parametrize("layout", [{"full": [0], "select": [2]}, {"full": [], "select": [0], "full_heads": [[1, 7]]}])
def test_a_calibration_that_does_not_fit_says_what_to_do(layout):
    found = spec(calibration={"version": VERSION, "tidal": layout})
    with pytest.raises(
        SpringtideError, match=r"^springtide.json does not fit the model \(tidal: .*[^.]\); run `springti"
    ):
        Tidal().resolve(found)
    with pytest.raises(SpringtideError, match=r"^tidal: layer 1 comes before"):
        Tidal(full=(0,), select=2).resolve(found)


def test_calibration_reaches_the_policy_through_the_engine():
    model = tiny("qwen3", num_hidden_layers=6)
    found = {"full": [0], "select": [1, 3], "map": {str(layer): list(sets) for layer, sets in MAP}}
    calibration = {"version": VERSION, "tidal": found}
    assert Engine(model, policy="tidal:budget=9", calibration=calibration).policy == Engine(model, policy=TIDAL).policy
    assert Engine(model, policy="tidal:budget=9,heads=map", calibration=calibration).policy == MAPPED


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Tidal(full=(0, 40), select=1, reselect=()), "no layer 40"),
        (Tidal(full=(0, 1), select=-1, reselect=()), "no layer -1"),
        (Tidal(full=(0,), select=4, reselect=()), "layer 1 comes before"),
        (Tidal(budget=0), "budget"),
        (Tidal(correct=0), "correct"),
        (Tidal(sinks=-1), "sinks"),
        (Tidal(recent=-1), "recent"),
        (Tidal(recent=Share(101)), "recent is 101%"),
        (Tidal(full=(0,), reselect=(5,)), "no layer that selects first; give select too"),
        (Tidal(full=()), "give select too"),
        (Tidal(full_heads=(KVHead(2, 1),)), "full, full_heads or reselect is given, but no layer that selects first"),
    ],
    ids=str,
)
def test_layouts_that_make_no_sense_are_refused(policy, message):
    with pytest.raises(SpringtideError, match=message):
        policy.resolve(spec())


def test_too_few_layers_for_the_default_can_still_be_named():
    few = spec(4, sliding=(0, 2))
    with pytest.raises(SpringtideError, match="2 layers"):
        Tidal(layout="paper").resolve(few)
    assert Tidal(full=(), select=1, reselect=()).resolve(few).dense_layers == (1,)


# Single KV heads that are dense


def test_full_heads_in_text():
    heads = (KVHead(2, 1), KVHead(14, 0))
    policy = parse_policy("tidal:budget=9,full_heads=2.1+14.0")
    assert policy.full_heads == heads and all(isinstance(head, KVHead) for head in policy.full_heads)
    assert "+".join(map(str, heads)) == "2.1+14.0" and [KVHead.parse(str(head)) for head in heads] == [*heads]
    assert parse_policy("tidal:full_heads=none").full_heads is parse_policy("tidal").full_heads is None


@pytest.mark.parametrize("text", ["2", "2.x", "x.1", "2.1.3", "2.", ".", "2.1+", "2.1+3", "2-1", "5%", "2.1 3.0"])
def test_full_heads_that_are_none(text):
    with pytest.raises(SpringtideError) as caught:
        parse_policy(f"tidal:full_heads={text}")
    assert str(caught.value) == f"tidal: full_heads is '{text}', but it must be heads as layer.head joined by +."


@pytest.mark.parametrize("layer", [0, 1, 3, -1, 6, 40])
def test_full_heads_of_layers_that_are_not_sparse_are_refused(layer):
    """Those that are dense anyway, and those that the model has not."""
    with pytest.raises(SpringtideError) as caught:
        engine_of(f"{TIDAL},full_heads=2.1+{layer}.1")
    assert str(caught.value) == (
        f"tidal: full_heads names KV head 1 of layer {layer}, but only heads 0 to 1 of layers that are sparse can be "
        "named: 2, 4, 5."
    )


@pytest.mark.parametrize("head", [-1, 2, 3])
def test_full_heads_that_a_layer_has_not_are_refused(head):
    with pytest.raises(SpringtideError, match=f"names KV head {head} of layer 4, .* named: 2, 4, 5[.]$"):
        engine_of(f"{TIDAL},full_heads=4.{head}")


def test_full_heads_of_a_sliding_layer_are_refused():
    with pytest.raises(SpringtideError, match=r"names KV head 0 of layer 4, .* sparse can be named: 5, 7[.]$"):
        engine_of("tidal:budget=6,full=1,select=3,full_heads=4.0", "qwen2", **DEEP)


def test_full_heads_need_a_layer_that_selects():
    for policy in ("tidal:full_heads=2.1", "tidal:layout=paper,full_heads=4.1"):
        with pytest.raises(SpringtideError, match=r"no layer that selects first; give select too[.]$"):
            engine_of(policy)


@pytest.mark.filterwarnings("error")
def test_calibrated_full_heads_are_used_with_calibrated_layers_alone():
    found = {"full": [0], "select": [1, 3], "full_heads": [[2, 1], [4, 0]]}
    engine = Engine(tiny("qwen3", num_hidden_layers=6), calibration={"version": VERSION, "tidal": found})
    assert engine.using("tidal:budget=9").policy == engine.using(HEADS).policy
    assert engine.using("tidal:budget=9").policy.full_heads == (KVHead(2, 1), KVHead(4, 0))
    for other in ("layout=paper", LAYERS):
        assert engine.using(f"tidal:budget=9,{other}").policy.full_heads == ()
    elsewhere = {"version": VERSION, "tidal": {**found, "full_heads": [[2, 2]]}}
    with pytest.raises(SpringtideError, match=r"names KV head 2 of layer 2, .*[.]$"):
        Engine(tiny("qwen3", num_hidden_layers=6), policy="tidal:budget=9", calibration=elsewhere)


@pytest.mark.parametrize(
    "broken", [[[2]], [[2, 1, 0]], [["2", 1]], [[2, 0.5]], ["2.1"], [2, 1], 2, None, [None]], ids=str
)
def test_broken_full_heads_of_a_calibration_are_refused(broken, tmp_path):
    content = {"version": VERSION, "tidal": {"full": [0], "select": [1, 3], "full_heads": [[2, 1]]}}
    (tmp_path / FILE).write_text(json.dumps(content))
    assert read_calibration(tmp_path) == content
    content["tidal"]["full_heads"] = [[2, 1], *broken] if isinstance(broken, list) else broken
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(SpringtideError, match=r"is broken .* run `springtide calibrate` again or delete the file[.]$"):
        read_calibration(tmp_path)


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
DEEP = {"num_hidden_layers": 8}


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_stay_as_they_are(name):
    """With every global layer dense, the smallest budget changes nothing."""
    full = engine_of("dense", name, **DEEP)
    sparse = full.using("tidal:budget=1,full=1+3+5,select=7")
    torch.testing.assert_close(sparse.score(PROMPT, 20), full.score(PROMPT, 20), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "policy", ["oracle:budget=4", "streaming:budget=4", "quest:budget=4,page=4", "tidal:budget=4,layout=paper"]
)
def test_only_global_layers_read_sparsely(policy):
    engine = engine_of(policy, "qwen2", **DEEP)
    read = set()
    list(engine.predictions(PROMPT, 30, meter=lambda layer, *_: read.add(layer.index)))
    assert read <= {1, 3, 5, 7} and 7 in read


@pytest.mark.parametrize("name", SLIDING)
def test_global_layers_are_sparse_between_sliding_ones(name):
    engine = engine_of("dense", name, **DEEP)
    sparse = engine.using("tidal:budget=6,layout=paper")
    assert sparse.policy.dense_layers == (1, 3, 5)
    assert (sparse.score(PROMPT, 20) - engine.score(PROMPT, 20)).abs().max() > 1e-4
    expected = sparse.generate(PROMPT, max_tokens=12).token_ids
    assert sparse.generate([PROMPT, PROMPT[:9]], max_tokens=12)[0].token_ids == expected


@pytest.mark.parametrize("options", ["full=1+2+3,select=5", "full=1+3,select=4", "full=1+3,select=5,reselect=6"])
def test_a_sliding_layer_cannot_be_full_or_select(options):
    with pytest.raises(SpringtideError, match="has a sliding window"):
        engine_of(f"tidal:budget=6,{options}", "qwen2", **DEEP)


def test_a_window_is_left_alone_at_the_layer():
    q, segment = case(3)
    segment.state = Tidal().new_state()
    layer = Layer(0, SCALE, window=6)
    for policy in (
        Tidal(budget=1, full=(), select=0, reselect=()),
        Quest(budget=1, page=1, skip=0),
        Streaming(budget=1),
    ):
        assert torch.equal(read(layer, q, segment, policy.reads(layer, q, segment)), dense(layer, q, segment))


# Correction


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


# Baselines


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 16))
def test_a_pages_bound_is_above_every_product_in_it(seed, length, page):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(KV_HEADS, length, HEAD_DIM, generator=generator, dtype=torch.float64)
    q = torch.randn(HEAD_DIM, generator=generator, dtype=torch.float64)
    low, high = page_bounds(keys, page)
    assert low.shape == high.shape == (KV_HEADS, -(-length // page), HEAD_DIM)
    for number, start in enumerate(range(0, length, page)):
        part = keys[:, start : start + page]
        assert torch.equal(low[:, number], part.amin(1)) and torch.equal(high[:, number], part.amax(1))
    bound = torch.maximum(q * low, q * high).sum(-1)
    for slot in range(length):
        assert (keys[:, slot] @ q <= bound[:, slot // page] + 1e-12).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 4), st.sampled_from(["max", "mean"]))
def test_quest_reads_the_pages_with_the_highest_bounds_and_the_newest(seed, page, pages, pool):
    q, segment = case(seed, prefix=27, parents=(PREFIX,), dtype=torch.float64)
    keys, _ = segment.cache.read(0, 0, segment.length)
    low, high = page_bounds(keys, page)
    chosen = Quest(budget=page * pages + page - 1, page=page, pool=pool).choose(Layer(0, SCALE), q, segment)
    last = 27 // page
    for kv_head in range(KV_HEADS):
        group = q[0, kv_head * GROUP : (kv_head + 1) * GROUP, None]
        bound = torch.maximum(group * low[kv_head], group * high[kv_head]).sum(-1)
        bound = bound.amax(0) if pool == "max" else bound.softmax(-1).mean(0)
        bound[last] = torch.inf
        best = bound.topk(min(pages, last + 1)).indices.sort().values.tolist()
        assert chosen[0, kv_head].tolist() == [p * page + i for p in best for i in range(page)]


def test_quest_keeps_each_rows_own_page_in_a_tree_that_spans_pages():
    q, segment = case(1, prefix=11, parents=(PREFIX, 0, 1, 2, 3))
    chosen = Quest(budget=4, page=4).choose(Layer(0, SCALE), q, segment)
    for row in range(5):
        assert (chosen[row] == 11 + row).any(-1).all()


@pytest.mark.parametrize(("budget", "sinks"), [(9, 3), (4, 4), (1, 4), (6, 0)])
def test_streaming_reads_the_sinks_and_the_newest_alone(budget, sinks):
    engine = engine_of(Streaming(budget=budget, sinks=sinks))
    read = {}

    def meter(layer, q, segment, index, mask, _):
        read.setdefault(layer.index, []).append(
            [set(i[m].tolist()) for i, m in zip(index[:, 1], mask[:, 1], strict=True)]
        )

    list(engine.predictions(PROMPT, 30, meter=meter))
    recent = max(1, budget - sinks)
    kept_sinks = min(sinks, budget - recent)
    expected = [{*range(kept_sinks), *range(at - recent + 1, at + 1)} for at in range(30, 39)]
    assert read == {layer: [expected] for layer in range(6)}


# Bytes

LAYER_BYTES = 2 * 8 * 4  # one token's key in one layer: 2 KV heads of 8 fp32 numbers


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [
        # keys and values of 41 tokens in 6 layers
        ("dense", 6 * 2 * 41),
        # 3 dense layers, of which 2 read all keys again to choose, and 3 that read 9 tokens
        (TIDAL, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 9),
        (MAPPED, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 9),
        # heads of 8 numbers that read everything, beside what is read for all
        (HEADS, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 9 + 2 * 41),
        # 30% of 64
        (GROWING, 3 * 2 * 41 + 2 * 41 + 3 * 2 * 20),
        ("streaming:budget=9", 6 * 2 * 9),
        # 2 dense layers, and 4 that read all keys to choose
        ("oracle:budget=9", 2 * 2 * 41 + 4 * (41 + 2 * 9)),
        # 2 dense layers, and 4 that read two bounds of 11 pages and 2 pages of 4
        ("quest:budget=9,page=4", 2 * 2 * 41 + 4 * (2 * 11 + 2 * 8)),
    ],
)
def test_bytes_read(policy, tokens):
    engine = engine_of(policy, dtype=torch.float32)
    _, segment = rows_after(engine, cached(engine, PROMPT), [5])
    assert segment.bytes_read == tokens * LAYER_BYTES
    # The first generated token comes with the prompt; the second is the one decoded.
    assert engine.generate(PROMPT, max_tokens=2).stats.kv_bytes_per_token == tokens * LAYER_BYTES


def test_bytes_read_of_sliding_layers_are_those_of_the_window():
    engine = engine_of("dense", "qwen2", torch.float32, **DEEP)
    _, segment = rows_after(engine, cached(engine, PROMPT), [5])
    assert segment.bytes_read == (4 * 2 * 41 + 4 * 2 * 9) * LAYER_BYTES


def test_state_is_not_kept_on_the_policy():
    policy = parse_policy(TIDAL)
    one, two = policy.new_state(), policy.new_state()
    one.selected = torch.zeros(1, 2, 3, dtype=torch.long)
    assert two.selected is None and replace(policy) == policy
