"""Every attention kernel computes softmax(q k / sqrt d) v, on whatever shapes and masks come."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide import kernels
from springtide.kernels import KV, Means, Visible, native, reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}


@st.composite
def cases(draw):
    """``q, k, v, mask, softcap``: random tensors, and a mask in which every row sees something, or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    rows, kv_heads, group = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    length, head_dim = draw(st.integers(1, 70)), draw(st.sampled_from([32, 64, 80, 128, 256]))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    # Queries come to the kernels as a transposed view, the cache as a slice of a longer buffer.
    q = normal(kv_heads * group, rows, head_dim).transpose(0, 1)
    k, v = (normal(kv_heads, length + 5, head_dim)[:, 2 : length + 2] for _ in range(2))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
        mask[torch.arange(rows), torch.randint(length, (rows,), generator=generator)] = True
    return q, k, v, mask, draw(st.sampled_from([None, None, 2.0]))


def naive(q, k, v, scale, visible, softcap=None):
    """One row and one head at a time in fp64; ``visible(row, kv_head)`` lists the slots that are read."""
    rows, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            kv_head = head * k.shape[0] // heads
            slots = visible(row, kv_head)
            logits = [float(q[row, head].double() @ k[kv_head, slot].double()) * scale for slot in slots]
            if softcap is not None:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            weights = [math.exp(x - max(logits)) for x in logits]
            for slot, weight in zip(slots, weights, strict=True):
                out[row, head] += weight / sum(weights) * v[kv_head, slot].double()
    return out


def whole(q, k, v):
    """Pages of which every row sees everything."""
    return KV.of(k, v, Visible.all(len(q), k.shape[1]))


def assert_near(got, expected, dtype=None):
    """Within the tolerance of ``dtype`` (default: ``got``'s own), relative to the largest value."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype or got.dtype]


@settings(deadline=None, max_examples=25)
@given(cases())
def test_reference_is_the_formula(case):
    q, k, v, mask, softcap = case
    q, k, v, mask = q[:3], k[:, :20], v[:, :20], None if mask is None else mask[:3, :20].clone()
    if mask is not None:
        mask[:, 0] = True
    seen = torch.ones(len(q), k.shape[1], dtype=torch.bool) if mask is None else mask
    expected = naive(q, k, v, 0.3, lambda row, _: seen[row].nonzero()[:, 0].tolist(), softcap)
    assert_near(reference.attend(q, k, v, 0.3, mask, softcap)[0], expected)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_attend_equals_reference(case):
    q, k, v, mask, softcap = case
    scale = q.shape[2] ** -0.5
    seen = Visible.all(len(q), k.shape[1]) if mask is None else Visible.by(mask)
    got, lse = kernels.attend(q, KV.of(k, v, seen), scale, softcap)
    assert got.dtype == q.dtype
    expected, mass = reference.attend(q.double(), k.double(), v.double(), scale, mask, softcap)
    assert_near(got, expected)
    assert_near(lse, mass, q.dtype)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 40), st.integers(0, 2**31))
def test_gathered_equals_attend_with_that_mask(case, budget, seed):
    """The same slots for all heads of a row: reading them alone is reading everything under a mask."""
    q, k, v, _, softcap = case
    generator = torch.Generator().manual_seed(seed)
    rows, length = len(q), k.shape[1]
    # Each row's own slots, in any order.
    index = torch.stack([torch.randperm(length, generator=generator)[:budget] for _ in range(rows)])
    valid = torch.rand(index.shape, generator=generator) < 0.7
    valid[:, 0] = True
    mask = torch.zeros(rows, length, dtype=torch.bool).scatter(1, index, valid)
    index, valid = (x[:, None].expand(-1, k.shape[0], -1) for x in (index, valid))
    got, lse = kernels.attend_gathered(q, whole(q, k, v), index, 0.2, valid, softcap)
    expected, mass = reference.attend(q.double(), k.double(), v.double(), 0.2, mask, softcap)
    assert_near(got, expected)
    assert_near(lse, mass, q.dtype)


@settings(deadline=None, max_examples=20)
@given(cases(), st.integers(1, 12), st.integers(0, 2**31))
def test_gathered_reads_each_kv_heads_own_slots(case, budget, seed):
    q, k, v, _, softcap = case
    q = q[:3]
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(q), *k.shape[:2], generator=generator).argsort(-1)
    index = order[..., :budget]
    expected = naive(q, k, v, 0.2, lambda row, kv_head: index[row, kv_head].tolist(), softcap)
    assert_near(kernels.attend_gathered(q, whole(q, k, v), index, 0.2, softcap=softcap)[0], expected)


# Means of blocks


def means_for(k, count, tokens, seed):
    """``count`` random means that fit the keys ``k``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (k.shape[0], count, k.shape[2])
    return Means(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(k.dtype) for _ in range(2)), tokens)


def gathered_slots(case, budget, seed):
    """Slots of each row and KV head, and a mask that hides some of them, and all of every third row."""
    q, k, *_ = case
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(len(q), *k.shape[:2], generator=generator).argsort(-1)[..., :budget]
    mask = torch.rand(index.shape, generator=generator) < 0.5
    mask[::3] = False
    return index, mask if seed % 3 else None


@settings(deadline=None, max_examples=25)
@given(cases(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_a_mean_is_as_many_slots_that_are_all_alike(case, budget, count, tokens, seed):
    q, k, v, _, softcap = case
    q, k, v = q[:3].double(), k.double(), v.double()
    index, mask = gathered_slots((q, k), budget, seed)
    means = means_for(k, count, tokens, seed)
    keys = torch.cat([k, means.keys.repeat_interleave(tokens, 1)], 1)
    values = torch.cat([v, means.values.repeat_interleave(tokens, 1)], 1)
    blocks = list(range(k.shape[1], keys.shape[1]))

    def visible(row, kv_head):
        slots = index[row, kv_head]
        return (slots if mask is None else slots[mask[row, kv_head]]).tolist() + blocks

    expected = naive(q, keys, values, 0.2, visible, softcap)
    assert_near(reference.attend_gathered(q, k, v, index, 0.2, mask, softcap, means)[0], expected)


@pytest.mark.parametrize("level", ["native", "torch"])
@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 70), st.integers(1, 20), st.sampled_from([1, 2, 64, 4096]), st.integers(0, 2**31))
def test_gathered_with_means_equals_reference(level, case, budget, count, tokens, seed):
    q, k, v, _, softcap = case
    index, mask = gathered_slots(case, budget, seed)
    means = means_for(k, count, tokens, seed)
    with pytest.MonkeyPatch.context() as patch:
        if level == "torch":
            patch.setattr(native, "level", lambda: None)
        got, _ = kernels.attend_gathered(q, whole(q, k, v), index, 0.2, mask, softcap, means)
    wide = Means(means.keys.double(), means.values.double(), tokens)
    assert got.dtype == q.dtype
    assert_near(got, reference.attend_gathered(q.double(), k.double(), v.double(), index, 0.2, mask, softcap, wide)[0])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_blocks_weigh_as_many_as_their_tokens(dtype, tokens):
    """Where all logits are equal, the values alone are averaged; a block's is 1, a slot's is 0."""
    q, k = torch.zeros(1, 2, 32, dtype=dtype), torch.randn(1, 400, 32, dtype=torch.float64).to(dtype)
    means = Means(k[:, :3], torch.ones_like(k[:, :3]), tokens)
    slots = torch.arange(300).view(1, 1, 300)
    got, _ = kernels.attend_gathered(q, KV.of(k, torch.zeros_like(k)), slots, 1.0, means=means)
    assert_near(got, torch.full((1, 2, 32), 3 * tokens / (3 * tokens + 300), dtype=torch.float64), dtype)


@settings(deadline=None, max_examples=20)
@given(cases())
def test_scores_are_the_scaled_and_capped_products(case):
    q, k, _, _, softcap = case
    got = kernels.scores(q, whole(q, k, k), 0.7, softcap)
    grouped = q.double().unflatten(1, (k.shape[0], -1))
    expected = torch.stack([grouped[:, head] @ k[head].double().T * 0.7 for head in range(k.shape[0])], dim=1)
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    assert got.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert_near(got, expected, q.dtype)


def test_softcap_bounds_the_logits():
    q = torch.full((1, 1, 32), 100.0)
    k = torch.cat([torch.full((1, 1, 32), 100.0), torch.zeros(1, 1, 32)], dim=1)
    v = torch.eye(2, 32)[None]
    weights = kernels.attend(q, KV.of(k, v), 1.0, softcap=2.0)[0][0, 0, :2]
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.0]).softmax(-1))


def test_masked_slots_do_not_count_even_with_the_largest_logit():
    q, k, v = torch.ones(1, 1, 32), torch.ones(1, 2, 32), torch.ones(1, 2, 32)
    k[:, 1], v[:, 1] = 1e3, 1e6
    mask = torch.tensor([[True, False]])
    assert torch.equal(kernels.attend(q, KV.of(k, v, Visible.by(mask)), 1.0)[0], torch.ones(1, 1, 32))
    assert torch.equal(reference.attend(q, k, v, 1.0, mask)[0], torch.ones(1, 1, 32))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 80))
def test_select_gives_the_highest_in_ascending_order(seed, length, budget):
    ranking = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(seed))
    got = kernels.select(ranking, budget)
    assert got.shape == (3, 2, min(budget, length))
    for row in range(3):
        for head in range(2):
            values = ranking[row, head].tolist()
            best = sorted(range(length), key=lambda i: -values[i])[:budget]
            assert got[row, head].tolist() == sorted(best)


@settings(deadline=None, max_examples=40)
@given(cases(), st.lists(st.integers(0, 70), max_size=3), st.integers(0, 2**31))
def test_merged_parts_are_attention_over_all_of_them(case, cuts, seed):
    """Of some parts a row may see nothing; then whatever the part says of it does not count."""
    q, k, v, mask, softcap = case
    length = k.shape[1]
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    parts = []
    for start, stop in pairwise(edges):
        own = None if mask is None else mask[:, start:stop]
        seen = Visible.all(len(q), stop - start) if own is None else Visible.by(own)
        out, lse = kernels.attend(q, KV.of(k[:, start:stop], v[:, start:stop], seen), 0.2, softcap)
        unseen = lse == -torch.inf
        assert own is None or torch.equal(unseen, ~own.any(1)[:, None].expand_as(unseen))
        parts.append((out.masked_fill(unseen[..., None], torch.nan), lse))
    out, lse = kernels.merge(parts)
    expected, mass = reference.attend(q.double(), k.double(), v.double(), 0.2, mask, softcap)
    assert out.dtype == q.dtype
    assert_near(out, expected)
    assert_near(lse, mass, q.dtype)
