"""Pages are counted to the byte, shared until someone writes, and given back."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from springtide.errors import SpringtideError
from springtide.kernels import PAGE
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool, PoolFullError

LAYERS, KV_HEADS, HEAD_DIM = 2, 3, 4
PAGE_BYTES = 2 * LAYERS * KV_HEADS * PAGE * HEAD_DIM * 4


def rows(count, value=0.0, dtype=torch.float32):
    return torch.full((KV_HEADS, count, HEAD_DIM), value, dtype=dtype)


def extend(cache, count, value=0.0):
    for layer in range(LAYERS):
        cache.write(layer, cache.length, rows(count, value + layer), rows(count, -value))
    cache.commit(cache.length, range(count), exact=True)


def test_what_is_used_is_counted_and_given_back():
    pool = Pool(LAYERS)
    assert pool.used == pool.groups[None].page_bytes == 0
    first, second = Cache(pool), Cache(pool)
    extend(first, PAGE + 1)
    extend(second, 3)
    assert pool.groups[None].page_bytes == PAGE_BYTES and pool.used == 3 * PAGE_BYTES
    assert (first.nbytes, second.nbytes) == (2 * PAGE_BYTES, PAGE_BYTES)
    first.crop(PAGE)
    assert pool.used == 2 * PAGE_BYTES
    del first, second
    gc.collect()
    assert pool.used == 0


def test_the_lowest_free_pages_are_taken_first():
    pool = Pool(LAYERS)
    caches = [Cache(pool) for _ in range(3)]
    for cache in caches:
        extend(cache, PAGE)
    caches[0].crop(0)
    caches[1].crop(0)
    extend(caches[1], 2 * PAGE + 1)
    assert caches[1].tables[None] == (0, 1, 3) and caches[2].tables[None] == (2,)


def test_growing_moves_nothing():
    pool = Pool(LAYERS)
    cache = Cache(pool)
    extend(cache, 1)
    before = pool.groups[None].page(cache.tables[None][0]).data_ptr()
    for _ in range(9):
        extend(cache, PAGE)
    assert pool.groups[None].page(cache.tables[None][0]).data_ptr() == before


def test_a_full_pool_says_so_and_goes_on_when_pages_come_back():
    pool = Pool(LAYERS, limit=2 * PAGE_BYTES + 1)
    first, second = Cache(pool), Cache(pool)
    extend(first, PAGE)
    extend(second, PAGE)
    with pytest.raises(PoolFullError, match="cache is full"):
        extend(second, 1)
    assert pool.used == 2 * PAGE_BYTES and second.length == PAGE
    first.crop(0)
    extend(second, 1)
    assert pool.used == 2 * PAGE_BYTES


def test_another_format_is_taken_only_when_nothing_is_left():
    pool = Pool(LAYERS)
    cache = Cache(pool)
    extend(cache, 1)
    with pytest.raises(SpringtideError, match="drop what was read"):
        cache.write(0, 1, rows(1, dtype=torch.bfloat16), rows(1, dtype=torch.bfloat16))
    cache.crop(0)
    cache.write(0, 0, rows(1, dtype=torch.bfloat16), rows(1, dtype=torch.bfloat16))
    assert cache.read(0, 0, 1)[0].dtype == torch.bfloat16 and pool.used == PAGE_BYTES // 2


def test_forks_share_pages_until_one_of_them_writes():
    pool = Pool(LAYERS)
    cache = Cache(pool)
    extend(cache, 2 * PAGE + 5, 1.0)
    twin, early = cache.fork(), cache.fork(PAGE)
    assert (
        pool.used == 3 * PAGE_BYTES
        and twin.tables[None] == cache.tables[None]
        and early.tables[None] == cache.tables[None][:1]
    )
    extend(twin, 1, 2.0)
    assert (
        pool.used == 4 * PAGE_BYTES
        and twin.tables[None][:2] == cache.tables[None][:2]
        and twin.tables[None][2] != cache.tables[None][2]
    )
    extend(cache, 1, 3.0)
    assert pool.used == 4 * PAGE_BYTES, "the last one left writes where it lies"
    twin.write(0, 3, rows(1, 9.0), rows(1, 9.0))
    assert pool.used == 5 * PAGE_BYTES
    assert cache.read(0, 3, 4)[0].unique().tolist() == [1.0] == early.read(0, 3, 4)[0].unique().tolist()
    assert twin.read(0, 2 * PAGE + 4, 2 * PAGE + 6)[0][0, :, 0].tolist() == [1.0, 2.0]
    assert cache.read(0, 2 * PAGE + 4, 2 * PAGE + 6)[0][0, :, 0].tolist() == [1.0, 3.0]


def test_rows_of_a_tree_are_kept_across_pages():
    pool = Pool(LAYERS)
    cache, start = Cache(pool), PAGE - 3
    extend(cache, start)
    numbers = torch.arange(8.0)[None, :, None].expand(KV_HEADS, -1, HEAD_DIM)
    for layer in range(LAYERS):
        cache.write(layer, start, numbers, -numbers)
    cache.commit(start, [0, 2, 3, 6, 7], exact=True)
    for layer in range(LAYERS):
        keys, values = cache.read(layer, start, cache.length)
        assert keys[1, :, 2].tolist() == [0, 2, 3, 6, 7] == (-values[1, :, 2]).tolist()


class PoolAndCaches(RuleBasedStateMachine):
    """Random caches that grow, fork, are cropped and dropped: who has which page, by the pool and by the caches."""

    @initialize()
    def start(self):
        self.pool = Pool(LAYERS)
        self.caches = []

    def one(self, data):
        """By its number: what is drawn itself would be kept alive."""
        return self.caches[data.draw(st.integers(0, len(self.caches) - 1))]

    @rule(count=st.integers(1, 3 * PAGE))
    def begin(self, count):
        self.caches.append(Cache(self.pool))
        extend(self.caches[-1], count)

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), count=st.integers(1, PAGE))
    def grow(self, data, count):
        extend(self.one(data), count)

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def fork(self, data):
        cache = self.one(data)
        self.caches.append(cache.fork(data.draw(st.integers(0, cache.length))))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def crop(self, data):
        cache = self.one(data)
        cache.crop(data.draw(st.integers(0, cache.length)))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def drop(self, data):
        self.caches.pop(data.draw(st.integers(0, len(self.caches) - 1)))

    @invariant()
    def every_page_is_counted_once(self):
        numbers = [number for cache in self.caches for number in cache.tables[None]]
        assert self.pool.used == len(set(numbers)) * PAGE_BYTES
        for number in set(numbers):
            assert self.pool.groups[None].shared(number) == (numbers.count(number) > 1)
        for cache in self.caches:
            assert len(cache.tables[None]) == -(-cache.length // PAGE) and len(set(cache.tables[None])) == len(
                cache.tables[None]
            )


TestPoolAndCaches = PoolAndCaches.TestCase
TestPoolAndCaches.settings = settings(deadline=None, max_examples=20, stateful_step_count=20)
