"""Policies for a tiny model of six layers, and segments whose keys and queries are made up."""

from __future__ import annotations

import pytest
import torch

from springtide.attention.policy import Policy
from springtide.attention.tidal import Tidal
from springtide.engine.engine import Engine
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.segment import PREFIX, Segment
from tiny import random_tokens, tiny

PROMPT = random_tokens(40)
LONG = random_tokens(140, seed=8)
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
DEEP = {"num_hidden_layers": 8}


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


KV_HEADS, GROUP, HEAD_DIM, SCALE = 2, 3, 8, 0.5
TREE = (PREFIX, 0, 0, 1, 1, 2)


def case(seed, prefix=20, parents=(PREFIX, 0, 1), dtype=torch.float32, window=None):
    """Random queries of a segment and the segment, whose keys are in its cache, of a layer with or without a window."""
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(Pool([window]))
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
