"""Pages that requests share: every row reads as it would alone, and grows, forks and commits as it should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide import kernels
from springtide.kernels import KV, PAGE, Pages, Reads, Visible, native, reference

LEVELS = [pytest.param(native._cpu.level(name), id=name) for name in native.levels()]
for_every_level = pytest.mark.parametrize("level", LEVELS)
PLAIN = {"sinks": 2, "recent": 5, "pool": "mean", "heads": "kv", "softcap": None}
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
SIZES = [1, 200, PAGE, PAGE + 1, 8 * PAGE - 3, 8 * PAGE, 8 * PAGE + 1, 17 * PAGE + 40]


def pages_of(count, dtype, generator):
    """A pool's part of a layer, full of numbers."""
    shape = (count, 2, KV_HEADS, PAGE, HEAD_DIM)
    return Pages((torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),))


@st.composite
def requests(draw, most_rows=70):
    """Page tables and what is seen: some requests begin with pages of the one before; chains, trees and windows."""
    tables, seen, taken = [], [], 0
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.sampled_from([1, 1, 2, 9, most_rows]))
        length = draw(st.sampled_from(SIZES)) + rows
        count = -(-length // PAGE)
        shared = draw(st.integers(0, min(count, len(tables[-1])))) if tables else 0
        table = [*(tables[-1][:shared] if shared else ()), *range(taken, taken + count - shared)]
        taken += count - shared
        # Pages of one's own may lie in any order.
        own = table[shared:]
        table[shared:] = own[::-1] if draw(st.booleans()) else own
        positions = torch.arange(length - rows, length, dtype=torch.int32)
        low = start = tail = None
        if draw(st.booleans()):
            window = draw(st.sampled_from([1, 30, PAGE, 9 * PAGE]))
            low, start = (positions - window + 1).clamp(min=0), max(0, length - rows - window + 1)
        if draw(st.booleans()):
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
            tail = (torch.rand(rows, rows, generator=generator) < 0.4) | torch.eye(rows, dtype=torch.bool)
        tables.append(tuple(table))
        seen.append(Visible(length - rows, length, positions, low, tail, start or 0))
    return tables, seen, max(taken, 1)


def alone(pages, tables, seen):
    """Each request's pages by themselves, and where its rows begin and end."""
    start = 0
    for table, own in zip(tables, seen, strict=True):
        rows = len(own.positions)
        yield KV(pages, Reads((table,), (own,))), slice(start, start + rows)
        start += rows


@for_every_level
@settings(deadline=None, max_examples=30)
@given(requests(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 3]))
def test_rows_side_by_side_are_each_row_alone(level, case, seed, dtype, threads):
    """Bit for bit: whoever is beside it, however many they are, and whoever else has its pages."""
    tables, seen, count = case
    generator = torch.Generator().manual_seed(seed)
    pages, rows = pages_of(count, dtype, generator), sum(len(own.positions) for own in seen)
    q = torch.randn(rows, HEADS, HEAD_DIM, generator=generator).to(dtype)
    joint, before = KV(pages, Reads(tuple(tables), tuple(seen))), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = native.attend(level, q, joint, 0.3, None)
    finally:
        torch.set_num_threads(before)
    for kv, own in alone(pages, tables, seen):
        ((keys, values, visible),) = kv.dense()
        wide = (x.double() for x in (q[own], keys, values))
        expected, mass = reference.attend(*wide, 0.3, visible.needed)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (out[own].double() - expected).abs().max() <= tolerance * expected.abs().max()
        assert (lse[own].double() - mass).abs().max() <= tolerance * mass.abs().max().clamp(min=1)
        by_itself = native.attend(level, q[own], kv, 0.3, None)
        assert torch.equal(by_itself[0], out[own]) and torch.equal(by_itself[1], lse[own])
        last = slice(own.stop - 1, own.stop)
        low, tail = (None if x is None else x[-1:] for x in (visible.low, visible.tail))
        prefix = visible.prefix if tail is not None else visible.length - 1
        one = Visible(prefix, visible.length, visible.positions[-1:], low, tail, visible.start)
        single = KV(pages, Reads(kv.reads.tables, (one,)))
        assert torch.equal(native.attend(level, q[last], single, 0.3, None)[0], out[last])


@for_every_level
@settings(deadline=None, max_examples=15)
@given(requests(most_rows=12), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_gathered_and_chosen_slots_are_found_through_the_table(level, case, seed, dtype):
    tables, seen, count = case
    generator = torch.Generator().manual_seed(seed)
    pages, rows = pages_of(count, dtype, generator), sum(len(own.positions) for own in seen)
    q = torch.randn(rows, HEADS, HEAD_DIM, generator=generator).to(dtype)
    budget = min(100, *(own.length for own in seen))
    index = torch.cat(
        [torch.randint(own.length, (len(own.positions), KV_HEADS, budget), generator=generator) for own in seen]
    )
    more, joint = (0.3, None, None, None), KV(pages, Reads(tuple(tables), tuple(seen)))
    out, lse = native.attend_gathered(level, q, joint, index, *more)
    for kv, own in alone(pages, tables, seen):
        by_itself = native.attend_gathered(level, q[own], kv, index[own], *more)
        assert torch.equal(by_itself[0], out[own]) and torch.equal(by_itself[1], lse[own])
        (table,), (visible,) = kv.reads.tables, kv.reads.seen
        dense = pages.read(table, 0, visible.length)
        in_order = KV.of(*dense, visible)
        assert torch.equal(native.attend_gathered(level, q[own], in_order, index[own], *more)[0], out[own])
        assert torch.equal(
            native.choose(level, q[own], kv, 0.3, budget, **PLAIN),
            native.choose(level, q[own], in_order, 0.3, budget, **PLAIN),
        )


@settings(deadline=None, max_examples=15)
@given(requests(most_rows=12), st.integers(0, 2**31), st.integers(1, 9))
def test_torch_reads_the_same_pages(case, seed, slab):
    """On slabs of any size, in fp64."""
    tables, seen, count = case
    generator = torch.Generator().manual_seed(seed)
    pages, rows = pages_of(-(-count // slab) * slab, torch.float64, generator), sum(len(own.positions) for own in seen)
    slabs = Pages(tuple(pages.slabs[0].split(slab)))
    q = torch.randn(rows, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    reads = Reads(tuple(tables), tuple(seen))
    out, lse = kernels.attend(q, KV(slabs, reads), 0.3)
    for kv, own in alone(pages, tables, seen):
        ((keys, values, visible),) = kv.dense()
        expected, mass = reference.attend(q[own], keys, values, 0.3, visible.needed)
        torch.testing.assert_close(out[own], expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(lse[own], mass, atol=1e-10, rtol=1e-10)
    k, v = torch.randn(2, KV_HEADS, rows, HEAD_DIM, generator=generator, dtype=torch.float64)
    kernels.write(KV(slabs, reads), k, v)
    (*_, last), (*_, table) = seen, tables
    got = slabs.read(table, last.prefix, last.length)
    own = slice(rows - len(last.positions), rows)
    assert torch.equal(got[0], k[:, own]) and torch.equal(got[1], v[:, own])


@for_every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_behind_each_prefix(level, dtype):
    generator = torch.Generator().manual_seed(0)
    pages = pages_of(5, dtype, generator)
    before, tables = pages.slabs[0].clone(), ((4, 0), (2,), (1, 3))
    seen = tuple(
        Visible(prefix, prefix + rows, torch.arange(prefix, prefix + rows, dtype=torch.int32))
        for prefix, rows in ((PAGE - 2, 5), (0, 1), (PAGE, 2))
    )
    k, v = torch.randn(2, 8, KV_HEADS, HEAD_DIM, generator=generator).to(dtype).transpose(1, 2)
    native.write(KV(pages, Reads(tables, seen)), k, v)
    places = [(4, PAGE - 2), (4, PAGE - 1), (0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]
    for row, (page, place) in enumerate(places):
        before[page, 0, :, place], before[page, 1, :, place] = k[:, row], v[:, row]
    assert torch.equal(pages.slabs[0], before)


def test_what_requests_share_is_read_once():
    """Where tables agree, rows are of one group; spans before a window are of none."""

    def groups(*requests):
        seen = [Visible(n - 1, n, torch.tensor([n - 1], dtype=torch.int32), low) for _, n, low in requests]
        return Reads(tuple(table for table, *_ in requests), tuple(seen)).native.groups

    span = native._cpu.SPAN // PAGE  # pages
    first, second = tuple(range(2 * span + 4)), (*range(span), *range(90, 94 + span))
    end = len(first) * PAGE
    assert groups((first, end, None)) == [([0], (0, 3))]
    assert groups((first, end, None), (first, end, None)) == [([0, 1], (0, 3))]
    both = groups((first, end, None), (second, end, None), (second[: span + 1], (span + 1) * PAGE, None))
    assert both == [([0, 1, 2], (0, 1)), ([0], (1, 3)), ([2], (1, 2)), ([1], (1, 3))]
    late = torch.tensor([2 * span * PAGE + 5], dtype=torch.int32)
    assert groups((first, end, late), (first, end, None)) == [([1], (0, 2)), ([0, 1], (2, 3))]


def test_what_is_read_once_is_counted_once():
    def seen(n, low=None, start=0):
        return Visible(n - 1, n, torch.tensor([n - 1], dtype=torch.int32), low, start=start)

    def reads(*requests):
        return Reads(tuple(table for table, _ in requests), tuple(own for _, own in requests))

    span, pages = native._cpu.SPAN, native._cpu.SPAN // PAGE
    first, second = tuple(range(2 * pages + 4)), (*range(pages), *range(90, 94 + pages))
    end = len(first) * PAGE
    assert reads((first, seen(end))).divided == [end]
    assert reads((first, seen(end)), (first, seen(end - 9))).divided == [end / 2, (end - 9) / 2]
    three = reads((first, seen(end)), (second, seen(end)), (second[: pages + 1], seen(span + 5)))
    assert three.divided == pytest.approx([span / 3 + end - span, span / 3 + end - span, span / 3 + 5])
    low = 2 * span + 5
    late = seen(end, torch.tensor([low], dtype=torch.int32), low)
    apart = (end - 2 * span) / 2
    assert reads((first, late), (first, seen(end))).divided == [(end - low) / 2, 2 * span + apart]
    kv = doubled(end)
    assert kernels.bytes_read(torch.zeros(2, 4, 8, dtype=torch.float64), kv) == 2 * [2 * kv.pages.slot_bytes * end]


def doubled(length):
    """Two requests that have the same pages, in a dtype that is read for each of them."""
    kv = KV.of(*torch.zeros(2, 2, length, 8, dtype=torch.float64))
    return KV(kv.pages, Reads.joined([kv.reads, kv.reads]))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_means_of_blocks(data):
    """In fp32 at least: 512 numbers near 100 would be lost in bf16. Blocks in parts are blocks in one."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    tokens = data.draw(st.sampled_from([1, 16, 64, PAGE, 4 * PAGE]))
    blocks, more = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    length = (blocks + more) * tokens
    table = data.draw(st.permutations(range(-(-length // PAGE) + 2)))
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        pages = pages_of(len(table), dtype, generator)
        pages.slabs[0].add_(100)
        means = pages.means(table, 0, blocks + more, tokens)
        assert (means.count, means.tokens, means.keys.dtype) == (blocks + more, tokens, dtype)
        assert means.nbytes == 2 * KV_HEADS * (blocks + more) * HEAD_DIM * dtype.itemsize
        for got, slots in zip((means.keys, means.values), pages.read(table, 0, length), strict=True):
            plain = slots.double().unflatten(1, (-1, tokens)).mean(2)
            torch.testing.assert_close(got.double(), plain, atol=0, rtol=tolerance)
        first = means.cut(blocks)
        assert (first.count, first.tokens, means.cut(99).count) == (blocks, tokens, means.count)
        assert torch.equal(first.keys, means.keys[:, :blocks]) and torch.equal(first.values, means.values[:, :blocks])
        joined = first.followed_by(pages.means(table, blocks, blocks + more, tokens))
        assert torch.equal(joined.keys, means.keys) and torch.equal(joined.values, means.values)
        assert joined.tokens == tokens and first.count == blocks
        before = means.keys.clone()
        pages.slabs[0].zero_()
        assert torch.equal(means.keys, before), "they are no view of the cache"
