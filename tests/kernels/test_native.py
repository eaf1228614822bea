"""The C++ kernels of every level that this machine has equal the reference, on whatever shapes come."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide import kernels
from springtide.kernels import KV, Means, Reads, Visible, native, reference
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.segment import PREFIX, Segment

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

LEVELS = [pytest.param(native._cpu.level(name), id=name) for name in native.levels()]
for_every_level = pytest.mark.parametrize("level", LEVELS)
exhaustive = settings(deadline=None, max_examples=25)


def near(got, expected, tolerance):
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs().max() / expected.abs().max()).item() <= tolerance


class Draw:
    """Random tensors of one dtype, as the kernels get them: queries transposed, keys and values out of a buffer."""

    def __init__(self, data):
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        self.dtype = data.draw(st.sampled_from(list(TOLERANCE)))
        self.head_dim = data.draw(st.sampled_from([8, 32, 64, 80, 96, 128, 256]))
        self.kv_heads, self.group = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 4, 7, 20]))
        self.softcap = data.draw(st.sampled_from([None, None, 2.0]))
        self.scale = self.head_dim**-0.5
        self.threads = torch.get_num_threads()

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def q(self, rows):
        return self.normal(self.kv_heads * self.group, rows, self.head_dim).transpose(0, 1)

    def slots(self, length):
        return self.normal(self.kv_heads, length + 5, self.head_dim)[:, 2 : length + 2]


@st.composite
def segments(draw):
    """Rows that follow a prefix: a chain or a tree; and a window, if any."""
    rows, prefix = draw(st.sampled_from([1, 2, 5, 17, 40, 70])), draw(st.sampled_from([1, 30, 128, 300, 2300]))
    parents = [draw(st.integers(-1, row - 1)) for row in range(rows)] if draw(st.booleans()) else range(-1, rows - 1)
    segment = Segment(Cache(Pool(1)), prefix, [0] * rows, [PREFIX if p < 0 else p for p in parents], "decode", None)
    return segment, draw(st.sampled_from([None, None, 1, 20, 200]))


def everything(rows, k, v):
    """Pages of which every row sees everything."""
    return KV.of(k, v, Visible.all(rows, k.shape[1]))


@for_every_level
@exhaustive
@given(st.data(), segments())
def test_attend(level, data, rows):
    """A prefix of any length, chains, trees, windows, soft caps, groups that do and don't fill a tile."""
    case, (segment, window) = Draw(data), rows
    seen = segment.seen(window)
    q, k, v = case.q(len(segment.tokens)), case.slots(seen.length), case.slots(seen.length)
    got, lse = native.attend(level, q, KV.of(k, v, seen), case.scale, case.softcap)
    expected, mass = reference.attend(q.double(), k.double(), v.double(), case.scale, seen.mask, case.softcap)
    assert got.dtype == case.dtype and lse.dtype == torch.float32
    near(got, expected, TOLERANCE[case.dtype])
    near(lse, mass, TOLERANCE[case.dtype])


@for_every_level
@exhaustive
@given(st.data(), st.sampled_from([1, 3, 20]), st.sampled_from([1, 16, 31, 64, 200]))
def test_attend_gathered(level, data, rows, budget):
    case = Draw(data)
    q, k, v = case.q(rows), case.slots(230), case.slots(230)
    index = torch.rand(rows, case.kv_heads, 230, generator=case.generator).argsort(-1)[..., :budget]
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(index.shape, generator=case.generator) < 0.6
        mask[..., 0] = True
    got, lse = native.attend_gathered(level, q, everything(rows, k, v), index, case.scale, mask, case.softcap, None)
    wide = (x.double() for x in (q, k, v))
    expected, mass = reference.attend_gathered(*wide, index, case.scale, mask, case.softcap)
    near(got, expected, TOLERANCE[case.dtype])
    near(lse, mass, TOLERANCE[case.dtype])


@for_every_level
@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.sampled_from([(1, 1), (1, 900), (1, 4000), (2, 7000), (3, 64), (17, 300), (64, 31), (70, 200), (70, 600)]),
    st.sampled_from([1, 2, 15, 16, 31, 64, 65, 200]), st.sampled_from([1, 2, 3, 64, 512, 4096]),
    st.sampled_from([8, 20, 64, 72, 100, 128]), st.sampled_from([0.0, 0.1, 0.6]),
)  # fmt: skip
def test_attend_gathered_with_means(level, data, shape, count, tokens, head_dim, shown):
    """Spans of slots, of which a row may see none, and blocks that weigh little or nearly everything."""
    case, (rows, budget) = Draw(data), shape
    case.head_dim, case.scale = head_dim, head_dim**-0.5
    q, k, v = case.q(rows), case.slots(budget + 30), case.slots(budget + 30)
    index = torch.rand(rows, case.kv_heads, budget + 30, generator=case.generator).argsort(-1)[..., :budget]
    means = Means(case.slots(count), case.slots(count), tokens)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(index.shape, generator=case.generator) < shown
        mask[::2, :, 0] = True
        mask[1::3] = False
    kv = everything(rows, k, v)
    got, _ = native.attend_gathered(level, q, kv, index, case.scale, mask, case.softcap, means)
    wide = Means(means.keys.double(), means.values.double(), tokens)
    expected, _ = reference.attend_gathered(
        q.double(), k.double(), v.double(), index, case.scale, mask, case.softcap, wide
    )
    assert got.dtype == case.dtype
    near(got, expected, TOLERANCE[case.dtype])


@for_every_level
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_means_may_lie_in_any_order(level, dtype):
    """A part of a longer tensor, which is read where it lies, and one with the heads inside."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 6, 40), (3, 90, 40), (3, 90, 40)))
    keys, values = (torch.randn(3, 200, 40, generator=generator).to(dtype) for _ in range(2))
    index = torch.rand(2, 3, 90, generator=generator).argsort(-1)[..., :50]
    whole = Means(keys[:, 20:57].contiguous(), values[:, 20:57].contiguous(), 64)
    kv = everything(len(q), k, v)
    expected, _ = native.attend_gathered(level, q, kv, index, 0.2, None, None, whole)
    parts = Means(keys[:, 20:], values[:, 20:], 64).cut(37)
    inside = Means(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (whole.keys, whole.values)), 64)
    turned = Means(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (whole.keys, whole.values)), 64)
    assert not any(x.is_contiguous() for x in (parts.keys, inside.keys, turned.values))
    for means in (parts, inside, turned, Means(parts.keys, whole.values, 64), Means(whole.keys, parts.values, 64)):
        assert torch.equal(native.attend_gathered(level, q, kv, index, 0.2, None, None, means)[0], expected)


@for_every_level
def test_long_prefixes_are_cut_and_joined(level):
    """Far more slots than a unit of work has, with logits that grow along them."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 32, generator=generator)
    k, v = (torch.randn(2, 9000, 32, generator=generator) for _ in range(2))
    k *= torch.linspace(0, 3, 9000)[None, :, None]
    got, _ = native.attend(level, q, everything(2, k, v), 0.5, None)
    near(got, reference.attend(q.double(), k.double(), v.double(), 0.5)[0], 1e-5)


def means_of(keys, values, tokens):
    return Means(*(x.unflatten(1, (-1, tokens)).mean(2) for x in (keys, values)), tokens)


@for_every_level
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_row_is_the_same_alone_and_among_others(level, dtype):
    """Bit for bit, so that drafting and batching change nothing: how a row is computed depends on nothing beside it."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(40, 8, 64, generator=generator).to(dtype)
    k, v = (torch.randn(2, 5040, 64, generator=generator).to(dtype) for _ in range(2))
    positions = torch.arange(5000, 5040, dtype=torch.int32)
    index = torch.rand(40, 2, 5000, generator=generator).argsort(-1)[..., :3000].contiguous()
    mask = torch.rand(index.shape, generator=generator) < 0.5
    means = means_of(k[:, :4992], v[:, :4992], 64)
    kv = KV.of(k, v, Visible(5000, 5040, positions))
    gathered, _ = native.attend_gathered(level, q, kv, index, 0.2, mask, None, means)
    together, _ = native.attend(level, q, kv, 0.2, None)
    chosen = native.choose(level, q, kv, 0.2, 99, **PLAIN)
    weight = torch.randn(48, 512, generator=generator).to(dtype)
    x = torch.randn(40, 512, generator=generator).to(dtype)
    product = native.linear(level, x, weight)
    for row in (0, 17, 39):
        own, seen = slice(row, row + 1), Visible(5000 + row, 5001 + row, positions[row : row + 1])
        alone = KV(kv.pages, Reads(kv.reads.tables, (seen,)))
        assert torch.equal(native.attend(level, q[own], alone, 0.2, None)[0][0], together[row])
        only, _ = native.attend_gathered(level, q[own], alone, index[own], 0.2, mask[own], None, means)
        assert torch.equal(only[0], gathered[row])
        assert torch.equal(native.choose(level, q[own], alone, 0.2, 99, **PLAIN)[0], chosen[row])
        assert torch.equal(native.linear(level, x[row : row + 1], weight)[0], product[row])


@for_every_level
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(level, threads):
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(3, 4, 32, generator=generator), torch.randn(1, 5000, 32, generator=generator)
    index, means = torch.arange(4000).expand(3, 1, -1), means_of(k, k, 100)
    before = torch.get_num_threads()
    kv = everything(3, k, k)
    expected, _ = native.attend(level, q, kv, 0.2, None)
    gathered, _ = native.attend_gathered(level, q, kv, index, 0.2, None, None, means)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native.attend(level, q, kv, 0.2, None)[0], expected)
        assert torch.equal(native.attend_gathered(level, q, kv, index, 0.2, None, None, means)[0], gathered)
    finally:
        torch.set_num_threads(before)


PLAIN = {"sinks": 2, "recent": 5, "pool": "mean", "heads": "kv", "softcap": None}


@for_every_level
@exhaustive
@given(
    st.data(), segments(), st.integers(1, 150), st.sampled_from([0, 2, 9]), st.sampled_from([0, 1, 12]),
    st.sampled_from(["mean", "max"]), st.sampled_from(["kv", "all"]),
)  # fmt: skip
def test_choose(level, data, rows, budget, sinks, recent, pool, heads):
    """The kernel's choice is the reference's, but for slots whose scores are within rounding of the last one chosen."""
    case, (segment, _) = Draw(data), rows
    seen = segment.seen()
    q, k = case.q(len(segment.tokens)), case.slots(seen.length)
    how = {"sinks": sinks, "recent": recent, "pool": pool, "heads": heads, "softcap": case.softcap}
    got = native.choose(level, q, KV.of(k, k, seen), case.scale, budget, **how)
    assert got.shape == (len(q), case.kv_heads, min(budget, seen.length))
    assert (got.diff(dim=-1) > 0).all()
    wanted = reference.scores(q.double(), k.double(), case.scale, case.softcap)
    pooled = reference.pooled(wanted, seen, pool, heads)
    kept = reference.keep_first(torch.zeros_like(pooled), seen, sinks, recent)
    ranking = torch.where(kept > 0, kept, pooled)
    expected = reference.select(ranking, budget)
    for row in range(len(q)):
        for head in range(case.kv_heads):
            differ = set(got[row, head].tolist()) ^ set(expected[row, head].tolist())
            last = ranking[row, head, expected[row, head]].min()
            for slot in differ:
                assert ranking[row, head, slot] == last or abs(ranking[row, head, slot] / last - 1) < 1e-4


@for_every_level
def test_choose_breaks_ties_by_place(level):
    q, k = torch.ones(1, 2, 32), torch.ones(1, 300, 32)
    seen = Visible(299, 300, torch.tensor([299], dtype=torch.int32))
    got = native.choose(level, q, KV.of(k, k, seen), 1.0, 10, **PLAIN | {"sinks": 0, "recent": 2})
    assert got[0, 0].tolist() == [*range(8), 298, 299]


@for_every_level
@exhaustive
@given(
    st.data(), st.sampled_from([1, 2, 5, 16, 33, 64, 90, 200]), st.sampled_from([32, 64, 72, 352, 4128]),
    st.sampled_from([16, 40, 64, 208, 272]), st.booleans(),
)  # fmt: skip
def test_linear(level, data, rows, inputs, outputs, biased):
    case = Draw(data)
    x, weight = case.normal(rows, inputs), case.normal(outputs, inputs)
    bias = case.normal(outputs) if biased else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    near(native.linear(level, x, weight, bias), expected, TOLERANCE[case.dtype])


@pytest.mark.parametrize("name", [*native.levels(), "torch"])
def test_the_environment_chooses_the_level(name):
    program = "from springtide.kernels import native; level = native.level(); print(level and level.name)"
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"SPRINGTIDE_KERNELS": name}, capture_output=True, text=True
    )
    assert result.stdout.strip() == ("None" if name == "torch" else name)


def test_an_unknown_level_is_refused():
    program = "from springtide.kernels import native; native.level()"
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"SPRINGTIDE_KERNELS": "sse9"}, capture_output=True, text=True
    )
    assert "SPRINGTIDE_KERNELS is 'sse9', but this machine has torch" in result.stderr


def test_without_the_extension_torch_runs_after_one_warning(monkeypatch):
    q, k = torch.randn(1, 4, 32), torch.randn(2, 50, 32)
    kv = KV.of(k, k)
    expected, _ = kernels.attend(q, kv, 0.2)
    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.delenv("SPRINGTIDE_KERNELS", raising=False)
    for function in (native.levels, native.level):
        function.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the C\\+\\+ kernels were not built") as caught:
            got = [kernels.attend(q, kv, 0.2)[0] for _ in range(3)]
    finally:
        for function in (native.levels, native.level):
            function.cache_clear()
    assert len(caught) == 1
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=0)
