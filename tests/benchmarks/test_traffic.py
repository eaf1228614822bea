"""What a step must read and compute is counted exactly."""

from __future__ import annotations

import pytest

from springtide.benchmarks import traffic
from springtide.engine.engine import Engine
from tiny import random_tokens, tiny

# Of the tiny models: 4 layers, width 32, 4 query and 2 KV heads of 8, FFN 48, vocabulary 97.
PROJECTIONS = 32 * 32 + 2 * 32 * 16 + 32 * 32
LAYER = PROJECTIONS + 3 * 32 * 48
NORMS = 4 * 2 * 32 + 32


@pytest.mark.parametrize("tied", [False, True])
def test_each_weight_is_read_once(tied):
    """A tied embedding is the head; one of its own gives a row."""
    model = tiny("llama", tie_word_embeddings=tied)
    assert traffic.weight_bytes(model) == 4 * (4 * LAYER + NORMS + 97 * 32 + (0 if tied else 32))


def test_a_token_takes_some_of_the_experts():
    model = tiny("mixtral")
    experts = 4 * 2 * 3 * 48 * 32  # layers, experts that a token takes, matrices
    router = 4 * 4 * 32
    assert traffic.weight_bytes(model) == 4 * (4 * PROJECTIONS + experts + router + NORMS + 97 * 32 + 32)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("length", [5, 40])
def test_dense_attention_reads_what_the_engine_counts(name, length):
    """With sliding windows too: every second layer of gemma2 has one of 9 tokens."""
    engine = Engine(tiny(name))
    output = engine.generate(random_tokens(length), max_tokens=2)
    cache = engine.read(random_tokens(length)).cache
    counted = traffic.dense_bytes(cache, engine.stack.spec.windows, length + 1)
    assert counted == output.stats.kv_bytes_per_token
    if name == "llama":
        assert counted == (length + 1) * 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, fp32


def test_operations_of_a_prompt():
    model = tiny("llama")
    attention = 4 * (4 * 8) * (1 + 2 + 3) * 4  # two products over 4 heads of 8, in 4 layers
    assert traffic.prefill_flops(model, (None,) * 4, 3) == 2 * 3 * 4 * LAYER + attention + 2 * 97 * 32
    windowed = 4 * (4 * 8) * (1 + 2 + 2) * 4
    assert traffic.prefill_flops(model, (2,) * 4, 3) == 2 * 3 * 4 * LAYER + windowed + 2 * 97 * 32


def test_bandwidth_is_measured(monkeypatch):
    monkeypatch.setattr(traffic, "BUFFER", 2**20)
    assert traffic.read_bandwidth() > 0
