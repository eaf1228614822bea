"""LongSpec never changes the output; its ring is the end of a full buffer; its trees grow as long as they pay."""

from __future__ import annotations

import json
import warnings
from copy import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drafters
from drafters import HIDDEN, VOCAB
from springtide import kernels
from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter, View
from springtide.drafting.longspec import MOST_NODES, WIDTH, WINDOW, Entry, LongSpec, Ring, context_layer, worthwhile
from springtide.drafting.tree import TokenTree
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.kernels import KV, Visible, reference
from springtide.model.stack import Stack
from springtide.rows.sampling import Sampling
from springtide.rows.segment import NO_TOKEN, PREFIX, PromptEmbeds
from stepping import passes
from tiny import random_tokens, tiny

PROMPT = random_tokens(29, vocab=VOCAB)
KV_HEADS, HEADS, HEAD_DIM = 2, 4, 8


def model(name="qwen3", **overrides):
    return tiny(name, torch.float64, **{"vocab_size": VOCAB} | overrides)


def drafting(own, name="qwen3", **overrides):
    """An engine that drafts in every pass."""
    return Engine(model(name, **overrides), drafter=own, adaptive=False)


def viewed(engine, tokens, state=None, cached=None, depth=9, gaps=0):
    """What the drafter sees of a request whose cache holds the first ``cached`` tokens (default: all but one)."""
    known = tokens[: len(tokens) - 1 if cached is None else cached]
    cache = engine.stack.read(known) if known else engine.stack.new_cache()
    return View(tokens, depth, state or engine.drafter.new_state(), cache, Policy(), None, gaps)


def proposed(engine, *views):
    return engine.drafter.propose(views)


def changed(own, change):
    """The drafter with other weights."""
    block = drafters.longspec().block
    block.load_state_dict({name: change(name, weight) for name, weight in own.block.state_dict().items()})
    return replace(own, block=block)


# Attention in parts


@pytest.mark.parametrize("prefix", [0, 1, 511, 512, 513, 4096])
@pytest.mark.parametrize("nodes", [1, 3, 7])
def test_split_and_merge_is_masked_attention(prefix, nodes):
    """The prefix unmasked, the tree masked, joined as ``w = sigmoid(lse_prefix - lse_tree)``."""
    generator = torch.Generator().manual_seed(prefix + nodes)
    q = torch.randn(nodes, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, KV_HEADS, prefix + nodes, HEAD_DIM, generator=generator, dtype=torch.float64)
    tree = torch.eye(nodes, dtype=torch.bool) | (torch.rand(nodes, nodes, generator=generator) < 0.5).tril()
    seen = torch.cat([torch.ones(nodes, prefix, dtype=torch.bool), tree], 1)
    expected, mass = reference.attend(q, k, v, 0.3, seen)
    parts = [
        reference.attend(q, k[:, :prefix], v[:, :prefix], 0.3),
        reference.attend(q, k[:, prefix:], v[:, prefix:], 0.3, tree),
    ]
    out, lse = kernels.merge(parts)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, mass, atol=1e-12, rtol=0)
    (first, above), (second, below) = parts
    share = torch.sigmoid(above - below)[..., None]
    assert prefix or not share.any()
    torch.testing.assert_close(share * first + (1 - share) * second, expected, atol=1e-12, rtol=0)
    whole, _ = kernels.attend(q, KV.of(k, v, Visible(prefix, prefix + nodes, torch.zeros(nodes), tail=tree)), 0.3)
    torch.testing.assert_close(whole, expected, atol=1e-12, rtol=0)


# The ring


def key(entries):
    """Made-up keys and values ``[H_kv, n, D]``, a function of position and token."""
    rows = [
        torch.randn(2, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(97 * place + token)).double()
        for place, token in entries
    ]
    return torch.stack(rows, 2).unbind(0)


def attended(ring, tokens, gaps, q, step):
    """What ``q [1, H, D]`` gives ``step`` nodes below the last of ``tokens``, on a chain of nodes of token 3."""
    missing = ring.missing(tokens, gaps)
    if missing:
        ring.write(missing, *key([(entry.position, entry.token) for entry in missing]))
    root = len(tokens) - 1 + gaps
    nodes = [ring.window + node for node in range(step + 1)]
    entries = [Entry(slot, root + node, 3) for node, slot in enumerate(nodes)]
    ring.write(entries, *key([(entry.position, 3) for entry in entries]))
    return ring.attend(q, root + step, root, torch.ones(1, step + 1, dtype=torch.bool))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(3, 9),
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=6),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_the_ring_is_the_end_of_a_full_buffer(window, turns, vectors, gaps, seed):
    """Whatever is taken back and goes on otherwise; rows that are no tokens come first, and leave gaps."""
    ring, tokens = Ring(window, nodes=4), [NO_TOKEN] * vectors
    gaps = gaps if vectors else 0
    for turn, (back, more, step) in enumerate(turns):
        tokens = tokens[: max(vectors, len(tokens) - back)] + random_tokens(more, seed + turn, VOCAB)
        q = torch.randn(1, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(turn), dtype=torch.float64)
        got = attended(ring, tokens, gaps, q, step)
        root = len(tokens) - 1 + gaps
        known = [(place + gaps, token) for place, token in enumerate(tokens[:-1]) if token != NO_TOKEN]
        buffer = [*known, *((root + node, 3) for node in range(step + 1))]
        keys, values = key(buffer)
        seen = torch.tensor([[place > root + step - window for place, _ in buffer]])
        expected, _ = reference.attend(q, keys, values, HEAD_DIM**-0.5, seen)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_at_most_a_window_is_computed():
    ring, tokens = Ring(8, nodes=1), random_tokens(100, vocab=VOCAB)
    assert len(ring.missing(tokens, 0)) == 7, "those before the last one, which is part of the tree"
    missing = ring.missing(tokens, 0)
    ring.write(missing, *key([(entry.position, entry.token) for entry in missing]))
    assert ring.missing(tokens, 0) == []
    assert [entry.position for entry in ring.missing([*tokens, 1, 2], 0)] == [99, 100]
    assert len(ring.missing(tokens[:50], 0)) == 7


def test_a_copied_ring_goes_on_by_itself():
    ring, tokens = Ring(4, nodes=1), random_tokens(9, vocab=VOCAB)
    q = torch.ones(1, HEADS, HEAD_DIM, dtype=torch.float64)
    before = attended(ring, tokens, 0, q, 0)
    twin = copy(ring)
    attended(twin, [*tokens[:-3], 1, 2, 1, 2, 1], 0, q, 0)
    assert ring.missing(tokens, 0) == [] and twin.missing(tokens, 0) != []
    assert torch.equal(attended(ring, tokens, 0, q, 0), before)


def test_it_takes_the_same_memory_at_any_length():
    engine = drafting(drafters.longspec(window=64, trained=2**17), max_position_embeddings=2**17)
    own, layer = engine.drafter, context_layer(engine.stack)
    sizes = {own.memory(0)}
    for length in (1024, 8192, 65536):
        cache = engine.stack.new_cache()
        keys = torch.randn(KV_HEADS, length - 1, HEAD_DIM, dtype=torch.float64)
        cache.write(layer, 0, keys, keys)
        cache.length = length - 1
        state = own.new_state()
        assert state.nbytes == 0
        view = View(random_tokens(length, vocab=VOCAB), 3, state, cache, Policy(), None)
        (tree,) = own.propose([view])
        assert len(tree.tokens) == 16
        sizes |= {state.nbytes, own.memory(length)}
    assert len(sizes) == 1


# Drafts


def test_drafts_are_of_the_tokens_that_there_are_now():
    """A branch is drafted for, taken back, and another taken: as if only that one had been there."""
    engine = drafting(drafters.longspec())
    state = engine.drafter.new_state()
    for tokens in (PROMPT, [*PROMPT, 1, 2, 3, 4], [*PROMPT[:-2], 5, 6], PROMPT[:9], [*PROMPT, 1, 2, 3, 4]):
        assert proposed(engine, viewed(engine, tokens, state)) == proposed(engine, viewed(engine, tokens))


def test_a_draft_depends_on_the_whole_context():
    engine = drafting(drafters.longspec(window=4))
    other = [(PROMPT[0] + 1) % VOCAB, *PROMPT[1:]]
    found = [proposed(engine, viewed(engine, tokens, cached=28))[0] for tokens in (PROMPT, other)]
    assert found[0] != found[1]


def test_several_are_drafted_for_as_each_alone():
    engine = drafting(drafters.longspec())
    prompts = [PROMPT, PROMPT[:2], random_tokens(40, 3, VOCAB), PROMPT[:1], PROMPT[:7]]
    depths = [9, 2, 3, 9, 0]
    shared = engine.stack.pool
    views = [viewed(engine, tokens, depth=depth) for tokens, depth in zip(prompts, depths, strict=True) if tokens]
    assert all(view.cache.pool is shared for view in views)
    alone = [proposed(engine, viewed(engine, t, depth=d))[0] for t, d in zip(prompts, depths, strict=True)]
    together = proposed(engine, *views)
    assert together == alone
    assert alone[3] == TokenTree.single(PROMPT[0]), "there is no context yet"
    assert alone[4] == TokenTree.single(PROMPT[6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_are_drafted_for_as_each_alone_by_the_fast_kernels(dtype):
    """Bit for bit, since a row's arithmetic depends on nothing beside it."""
    engine = Engine(tiny("qwen3", dtype, vocab_size=VOCAB), drafter=drafters.longspec(), adaptive=False)
    prompts = [PROMPT, PROMPT[:2], random_tokens(40, 3, VOCAB)]
    together = proposed(engine, *(viewed(engine, tokens) for tokens in prompts))
    assert together == [proposed(engine, viewed(engine, tokens))[0] for tokens in prompts]
    assert all(len(tree.tokens) == 16 for tree in together)


def test_a_tree_is_as_deep_as_is_asked_for():
    engine = drafting(changed(drafters.longspec(), lambda name, weight: weight * (4 if name == "norm.weight" else 1)))
    for depth in range(5):
        (tree,) = proposed(engine, viewed(engine, PROMPT, depth=depth))
        assert tree.limited(depth) == tree
        assert depth == 0 or tree.limited(min(depth, 3) - 1) != tree


def test_gaps_of_a_prompt_of_vectors_move_positions():
    engine = drafting(drafters.longspec())
    found = [proposed(engine, viewed(engine, PROMPT, gaps=gaps))[0] for gaps in (0, 40)]
    assert found[0] != found[1]
    seen = []
    guess = engine.drafter.target.rotate
    engine.drafter.target.rotate = lambda layer, q, positions: seen.append(positions) or guess(layer, q, positions)
    proposed(engine, viewed(engine, PROMPT, gaps=40))
    assert seen[0] == [len(PROMPT) - 1 + 40]


def test_a_request_says_what_gaps_its_prompt_has():
    engine = drafting(drafters.longspec())
    embeds = PromptEmbeds(torch.randn(3, HIDDEN, dtype=torch.float64), (0, 4, 6), 9)
    request = engine.start(PROMPT, Sampling(6), embeds=embeds)
    assert request.view(4).gaps == 6
    plain = engine.start(PROMPT, Sampling(6), embeds=embeds, draft=Drafter())
    list(engine.run([request, plain]))
    assert request.output == plain.output and request.drafted


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "granite", "smollm3", "olmo2", "glm4", "cohere2"])
def test_greedy_is_as_without_a_drafter_on_other_architectures(name):
    expected = Engine(model(name)).generate(PROMPT, max_tokens=24)
    drafted = drafting(drafters.longspec(), name).generate(PROMPT, max_tokens=24)
    assert drafted.token_ids == expected.token_ids and drafted.stats.drafted_tokens > drafted.stats.accepted_tokens > 0


ADVERSARIES = {
    "huge": lambda name, weight: weight * 1e30,
    "constant": lambda name, weight: weight * 0,
    "negated": lambda name, weight: -weight,
}


@pytest.mark.parametrize("change", ADVERSARIES.values(), ids=ADVERSARIES.keys())
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 4}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_worst_drafts_change_nothing_but_how_many_are_kept(change, options, dtype):
    engine = Engine(tiny("qwen3", dtype, vocab_size=VOCAB), adaptive=False)
    expected = engine.generate(PROMPT, max_tokens=24, **options)
    drafted = engine.drafting(changed(drafters.longspec(), change)).generate(PROMPT, max_tokens=24, **options)
    assert drafted.token_ids == expected.token_ids


def test_a_context_beyond_what_was_trained_warns_once():
    engine = drafting(drafters.longspec(trained=35))
    request = engine.start(PROMPT, Sampling(20))
    with pytest.warns(UserWarning, match="was trained for 35 positions") as found:
        for _ in passes(engine, [request]):
            pass
    assert len([w for w in found if "35 positions" in str(w.message)]) == 1
    assert request.output == Engine(model()).generate(PROMPT, max_tokens=20).token_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(PROMPT[:5], max_tokens=20)


# A sparse read of the context


def test_a_sparse_read_of_everything_is_a_dense_one():
    dense = drafting(drafters.longspec())
    sparse = drafting(drafters.longspec(cross=len(PROMPT)))
    views = [viewed(engine, tokens) for engine in (dense, sparse) for tokens in (PROMPT, PROMPT[:5])]
    assert dense.drafter.propose(views[:2]) == sparse.drafter.propose(views[2:])


def test_a_sparse_read_is_of_so_many_slots(monkeypatch):
    sizes, gathered = [], kernels.attend_gathered
    monkeypatch.setattr(
        kernels,
        "attend_gathered",
        lambda q, kv, index, *a, **o: sizes.append(index.shape) or gathered(q, kv, index, *a, **o),
    )
    engine = drafting(drafters.longspec(cross=7))
    proposed(engine, viewed(engine, PROMPT))
    assert [shape[2] for shape in sizes] == [7, 7, 7] and sizes[0][0] == 1 < sizes[1][0]


@pytest.mark.parametrize(
    ("cross", "message"), [(0, "longspec: cross is 0, but it must be at least 1"), ("some", "must be a whole number")]
)
def test_a_sparse_read_of_nothing_is_refused(cross, message):
    with pytest.raises(SpringtideError, match=message):
        drafting(drafters.longspec(cross=cross))


# Trees


def test_nodes_are_worth_their_rows():
    odds, flat = [1.0, 0.5, 0.3, 0.4, 0.05, 0.0], [1.0] * 9
    assert worthwhile(odds, flat, 1.0) == [0, 1, 2, 3, 4]
    assert worthwhile(odds, flat[:3], 1.0) == [0, 1, 3]
    assert worthwhile(odds, [1, 1.1, 1.2, 1.3, 1.4, 1.5], 1.0) == [0, 1, 2, 3]
    assert worthwhile(odds, [1, 1.1, 1.2, 1.3, 1.4, 1.5], 3.5) == [0, 1, 3]
    assert worthwhile(odds, [1, 9, 9, 9], 1.0) == [0]
    assert worthwhile([1.0], [1.0], 1.0) == [0]
    assert worthwhile([1.0, 0.4, 0.4], [1, 1.5, 1.6, 1.7], 1.0) == [0, 1, 2], "a step that rows share"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), max_size=20), st.floats(0.1, 9), st.integers(1, 9))
def test_a_node_never_comes_without_its_parent(nodes, rate, rows):
    parents, odds = [PREFIX], [1.0]
    for back, share in nodes:
        parents.append(max(0, len(parents) - 1 - back))
        odds.append(odds[parents[-1]] * share)
    kept = worthwhile(odds, [1 + 0.1 * n for n in range(rows)], rate)
    assert kept[0] == 0 and len(kept) <= rows and kept == sorted(kept)
    assert all(parents[node] in kept for node in kept[1:])


def test_a_tree_has_the_most_probable_paths():
    """By the block's own probabilities, of which every node's are asked for."""
    engine = drafting(drafters.longspec(prices=(1.0,) * 40))
    found, guess = {}, engine.drafter.guess

    def spy(trees, step):
        guesses, shares = guess(trees, step)
        for node, own, odds in zip(trees[0].frontier, guesses[0], shares[0], strict=True):
            path = []
            while node:
                path.insert(0, trees[0].tokens[node])
                node = trees[0].parents[node]
            found.update({(*path, token): share for token, share in zip(own, odds, strict=True)})
        return guesses, shares

    object.__setattr__(engine.drafter, "guess", spy)
    (tree,) = proposed(engine, viewed(engine, PROMPT))
    paths = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        paths.append((*paths[parent], token))

    def odds(path):
        return 1.0 if not path else found[path] * odds(path[:-1])

    assert len({*paths}) == len(paths) == 40
    left = [odds(path) for path in found if path not in paths]
    assert max(left) <= min(odds(path) for path in paths)
    assert len({path[:-1] for path in found if len(path) == 3}) <= WIDTH


def test_tuning_weighs_what_rows_and_levels_cost(monkeypatch):
    ready = drafting(drafters.longspec(accuracy=[[0.6, 0.2]] * 3)).drafter

    def tuned(level, cost):
        monkeypatch.setattr(LongSpec, "_level_time", lambda _: level)
        return ready.tuned(cost)

    free = tuned(0.0, lambda rows: 10.0)
    assert free.prices == (1.0,) * MOST_NODES and free.most_rows == MOST_NODES
    assert free.gain == pytest.approx(1 + 0.8 + 0.64 + 0.512)
    linear = tuned(1.0, lambda rows: 10.0 * rows)
    assert linear.gain == 1.0 and linear.most_rows == 3, "a tree adds less than three tokens"
    dear = tuned(20.0, lambda rows: 10.0)
    assert (dear.level, dear.gain) == (2.0, 1.0)
    middle = tuned(1.0, lambda rows: 10 + 0.1 * rows)
    assert 1.5 < middle.gain < free.gain
    engine = drafting(drafters.longspec())
    rows = []
    for own in (free, middle, linear, dear):
        engine.drafter = own
        rows.append(len(proposed(engine, viewed(engine, PROMPT))[0].tokens))
    assert rows[0] > rows[1] > 1 and rows[3] == 1, "what does not pay is not drafted"


def test_a_level_is_timed_on_the_model():
    ready = drafting(drafters.longspec()).drafter.tuned(lambda rows: 1e6 + rows)
    assert 0 < ready.level < 0.1 and ready.target is not None


def test_temperatures_flatten_what_is_too_sure():
    sharp = changed(drafters.longspec(prices=(1.0,) * 8), lambda n, weight: weight * (9 if n == "norm.weight" else 1))
    depths = []
    for temperature in (1.0, 30.0):
        engine = drafting(replace(sharp, temperatures=(temperature,) * 3))
        (tree,) = proposed(engine, viewed(engine, PROMPT))
        depths.append(sum(tree.limited(depth) != tree for depth in range(4)))
    assert depths[0] > depths[1]


# Folders and models


def test_a_saved_drafter_is_loaded_as_it_was(tmp_path):
    before = drafters.longspec(
        accuracy=[[0.5, 0.25], [0.25, 0.125], [0.125, 0.0]],
        temperatures=(1.0, 0.75, 1.5),
        trained=999,
        base=Stack(model()).fingerprint,
    )
    before.save(tmp_path / "drafter")
    after = LongSpec.load(tmp_path / "drafter")
    for name, weight in before.block.state_dict().items():
        assert torch.equal(after.block.state_dict()[name], weight.bfloat16())
    fields = ("vocab_size", "base", "window", "trained", "temperatures", "accuracy", "cross")
    assert [getattr(after, name) for name in fields] == [getattr(before, name) for name in fields]
    expected = Engine(model()).generate(PROMPT, max_tokens=24).token_ids
    assert drafting(after).generate(PROMPT, max_tokens=24).token_ids == expected
    assert {weight.dtype for weight in after.block.parameters()} == {torch.bfloat16}, "it stays as it was"


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ({"hidden_size": 16}, "hidden states of size 32, but this model's is 16"),
        ({"vocab_size": 97}, "a vocabulary of 7, but this model's is 97"),
        ({"num_key_value_heads": 4}, "2 KV heads of size 8, but this one has 4 of size 8"),
        ({"head_dim": 16}, "2 KV heads of size 8, but this one has 2 of size 16"),
        ({}, "trained for another model of the same size"),
    ],
    ids=str,
)
def test_a_drafter_for_another_model_is_refused(target, fault):
    with pytest.raises(SpringtideError, match=fault):
        drafting(drafters.longspec(base=None if target else "0123456789abcdef"), **target)


@pytest.mark.parametrize("name", ["mistral", "phi3", "starcoder2"])
def test_a_model_without_a_layer_to_read_is_refused(name):
    with pytest.raises(SpringtideError, match="All layers of this model have a sliding window"):
        drafting(drafters.longspec(), name)
    assert context_layer(Stack(model("gemma2"))) == 3, "the last one without a window"
    assert context_layer(Stack(model("gemma2", num_hidden_layers=5))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: value}, "whose parts fit together; train it again")
            for name, value in [
                ("heads", 3),
                ("heads", 0),
                ("kv_heads", 0),
                ("head_dim", "8"),
                ("hidden_size", 64),
                ("intermediate_size", -1),
                ("window", 2),
                ("window", "12"),
                ("trained", 0),
                ("temperatures", []),
                ("temperatures", [1.0, -1.0, 1.0]),
                ("temperatures", [1.0] * 9),
                ("accuracy", [[0.5]]),
                ("accuracy", [[0.5], [1.5], [0.5]]),
                ("more", 1),
            ]
        ),
        ({"window": 513}, "sees 513 tokens, but only the last 512 are kept"),
    ],
    ids=str,
)
def test_a_folder_whose_parts_do_not_fit_is_refused(tmp_path, change, message):
    drafters.longspec().save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SpringtideError, match=message):
        LongSpec.load(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    changed(drafters.longspec(), lambda name, w: w * torch.nan if name == "down.weight" else w).save(tmp_path)
    with pytest.raises(SpringtideError, match=r"'down.weight' in .* holds NaN or infinite values"):
        LongSpec.load(tmp_path)


def test_a_ring_is_no_larger_than_what_a_drafter_may_see():
    assert drafters.longspec(window=WINDOW).new_state().window == WINDOW
