"""Sequences pass by pass, and what their caches should hold."""

from __future__ import annotations

import torch

from springtide.attention.policy import Policy
from springtide.engine.loop import Loop
from springtide.kernels import PAGE
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.segment import Segment


def passes(engine, sequences, **options):
    """Run ``sequences`` to their ends side by side; yields after every pass. ``options`` are the loop's."""
    loop = Loop(engine.stack, engine.eos, **options)
    while running := [sequence for sequence in sequences if sequence.finish_reason is None]:
        loop.step(running)
        yield


def steps(engine, sequence, **options):
    """Run one sequence to its end; yields after every pass."""
    return passes(engine, [sequence], **options)


def holding(length, exact=None):
    """A cache of one layer that pretends to hold ``length`` tokens."""
    cache = Cache(Pool(1))
    cache.length, cache.exact = length, length if exact is None else exact
    return cache


def prefilled(engine, tokens):
    """Keys and values of ``tokens`` as a dense prompt, one pair a layer."""
    segment = Segment.chain(engine.stack.new_cache(), 0, tokens, "prompt", Policy())
    engine.stack.forward([segment])
    rows = [segment.cache.read(layer, 0, len(tokens)) for layer in range(engine.stack.spec.num_layers)]
    return [(keys.clone(), values.clone()) for keys, values in rows]  # the cache's own go with it


def check_cache(engine, sequence):
    """The cache of an fp64 sequence is what a dense prompt of its tokens would have written."""
    length = sequence.cache.length
    assert length == len(sequence.tokens) - 1
    for layer, expected in enumerate(prefilled(engine, sequence.tokens[:length])):
        for got, wanted in zip(sequence.cache.read(layer, 0, length), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


@torch.inference_mode()
def poison(cache, layers, value=torch.nan):
    """Make everything on the cache's pages that is not committed unusable."""
    for layer in range(layers):
        like, _ = cache.read(layer, 0, 1)
        rows = like.new_full(
            (len(like), len(cache.tables[cache.pool.windows[layer]]) * PAGE - cache.length, like.shape[2]), value
        )
        cache.write(layer, cache.length, rows, rows)
