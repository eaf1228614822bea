"""The cache against a plain list of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from springtide.kernels import PAGE
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool

LAYERS, KV_HEADS, HEAD_DIM = 2, 3, 4
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def rows(count, dtype=torch.float32, seed=0):
    """Keys or values ``[H_kv, count, D]``."""
    return torch.randn(KV_HEADS, count, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def append(cache, keys, values, kept=None):
    """Write the same rows to every layer and keep some of them."""
    start = cache.length
    for layer in range(LAYERS):
        cache.write(layer, start, keys + layer, values - layer)
    cache.commit(start, list(range(keys.shape[1])) if kept is None else kept, exact=True)


def assert_holds(cache, keys, values):
    """The committed tokens are ``keys, values``, exactly, in every layer."""
    assert cache.length == keys.shape[1]
    for layer in range(LAYERS):
        k, v = cache.read(layer, 0, cache.length)
        assert torch.equal(k, keys + layer) and torch.equal(v, values - layer)


@every_dtype
def test_dtype_is_what_was_written(dtype):
    cache, keys, values = Cache(Pool(LAYERS)), rows(5, dtype), rows(5, dtype, seed=1)
    append(cache, keys, values)
    assert cache.read(0, 0, 5)[0].dtype == dtype
    assert cache.nbytes == 2 * LAYERS * KV_HEADS * PAGE * HEAD_DIM * dtype.itemsize
    assert_holds(cache, keys, values)


@every_dtype
def test_commit_with_gaps_gathers_the_rows(dtype):
    cache, old, new = Cache(Pool(LAYERS)), rows(7, dtype), rows(9, dtype, seed=1)
    append(cache, old, old)
    append(cache, new, new, kept=[0, 2, 3, 7])
    expected = torch.cat([old, new[:, [0, 2, 3, 7]]], dim=1)
    assert_holds(cache, expected, expected)


@every_dtype
def test_growing_keeps_the_content(dtype):
    cache, parts = Cache(Pool(LAYERS)), [rows(100, dtype, seed) for seed in range(12)]
    for part in parts:
        append(cache, part, part)
    assert_holds(cache, torch.cat(parts, dim=1), torch.cat(parts, dim=1))


def test_a_branch_past_the_end_of_the_buffer_is_committed_into_the_grown_one():
    cache, old, new = Cache(Pool(LAYERS)), rows(PAGE - 2), rows(6, seed=1)
    append(cache, old, old)
    append(cache, new, new, kept=[1, 5])
    expected = torch.cat([old, new[:, [1, 5]]], dim=1)
    assert_holds(cache, expected, expected)


def test_what_was_written_in_inference_mode_can_be_committed_outside_of_it():
    cache, new = Cache(Pool(LAYERS)), rows(5)
    with torch.inference_mode():
        for layer in range(LAYERS):
            cache.write(layer, 0, new + layer, new - layer)
    cache.commit(0, [1, 4], exact=True)
    assert_holds(cache, new[:, [1, 4]], new[:, [1, 4]])


def test_an_empty_cache_can_be_forked_and_cropped():
    cache = Cache(Pool(LAYERS))
    cache.crop(0)
    twin = cache.fork()
    append(twin, rows(2), rows(2))
    assert cache.length == 0 and cache.nbytes == 0 and twin.length == 2


class CacheAndList(RuleBasedStateMachine):
    """Random operations on a cache, and on the list of numbers that its slots should hold."""

    @initialize()
    def start(self):
        self.cache, self.expected, self.next = Cache(Pool(LAYERS)), [], 1.0
        self.forked = []

    def _write(self, start, count):
        """Rows whose every entry is a number that no other row has."""
        numbers = [self.next + i for i in range(count)]
        self.next += count
        block = torch.tensor(numbers)[None, :, None].expand(KV_HEADS, -1, HEAD_DIM)
        for layer in range(LAYERS):
            self.cache.write(layer, start, block * (layer + 1), -block)
        return numbers

    @rule(data=st.data(), count=st.integers(1, 90))
    def append(self, data, count):
        kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
        numbers = self._write(len(self.expected), count)
        self.cache.commit(len(self.expected), kept, exact=True)
        self.expected += [numbers[i] for i in kept]

    @rule(count=st.integers(1, 20))
    def write_and_drop(self, count):
        self._write(len(self.expected), count)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), count=st.integers(1, 30))
    def refresh(self, data, count):
        start = data.draw(st.integers(0, len(self.expected) - 1))
        numbers = self._write(start, count)
        self.cache.commit(start, range(count), exact=True)
        self.expected[start : start + count] = numbers

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def crop(self, data):
        length = data.draw(st.integers(0, len(self.expected) + 5))
        self.cache.crop(length)
        del self.expected[length:]

    @rule()
    def fork(self):
        """Go on with the copy; the original must stay as it is."""
        self.forked.append((self.cache, list(self.expected)))
        self.cache = self.cache.fork()

    @invariant()
    def same(self):
        for cache, expected in [*self.forked, (self.cache, self.expected)]:
            assert cache.length == len(expected)
            for layer in range(LAYERS) if expected else ():
                keys, values = cache.read(layer, 0, cache.length)
                numbers = torch.tensor(expected)[None, :, None].expand(KV_HEADS, -1, HEAD_DIM)
                assert torch.equal(keys, numbers * (layer + 1)) and torch.equal(values, -numbers)


TestCacheAndList = CacheAndList.TestCase
TestCacheAndList.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)
