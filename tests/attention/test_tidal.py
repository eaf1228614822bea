"""Which tokens TidalDecode selects, for which heads, and in which layers."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending import (
    DEEP,
    GROUP,
    HEADS,
    KV_HEADS,
    LAYERS,
    MAP,
    MAPPED,
    PROMPT,
    SCALE,
    TIDAL,
    TREE,
    cached,
    case,
    engine_of,
    rows_after,
    seen_by,
)
from springtide.attention import parse_policy
from springtide.attention.calibration import FILE, VERSION, read_calibration
from springtide.attention.policy import Layer, Policy
from springtide.attention.tidal import NotCalibratedError, Tidal
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.kernels.reference import keep_first
from springtide.options import KVHead, Share
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.segment import PREFIX, Segment
from springtide.rows.spec import ModelSpec
from tiny import tiny

# Selection, on keys and queries made up for it


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


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 22), st.integers(0, 100))
def test_recent_may_be_a_share_of_the_budget(seed, budget, percent):
    q, segment = case(seed, parents=TREE)
    chosen = Tidal(budget=budget, recent=Share(percent)).choose(Layer(0, SCALE), q, segment)
    same = Tidal(budget=budget, recent=-(-budget * percent // 100)).choose(Layer(0, SCALE), q, segment)
    assert torch.equal(chosen, same)


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


def test_state_is_not_kept_on_the_policy():
    policy = parse_policy(TIDAL)
    one, two = policy.new_state(), policy.new_state()
    one.selected = torch.zeros(1, 2, 3, dtype=torch.long)
    assert two.selected is None and replace(policy) == policy


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


@pytest.mark.parametrize("options", ["full=1+2+3,select=5", "full=1+3,select=4", "full=1+3,select=5,reselect=6"])
def test_a_sliding_layer_cannot_be_full_or_select(options):
    with pytest.raises(SpringtideError, match="has a sliding window"):
        engine_of(f"tidal:budget=6,{options}", "qwen2", **DEEP)


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
