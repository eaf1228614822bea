"""Scaled rotary embeddings: the tokens that transformers generates before, across and beyond the trained length."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from guesses import Guesses
from springtide.drafting.lookup import Lookup
from springtide.engine import loop
from springtide.engine.engine import Engine
from springtide.rows.sampling import Sampling
from tiny import random_tokens, tiny

TRAINED = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": TRAINED,
}
SCALED = {
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": TRAINED, "sliding_window": None},
    ),
    "llama-longrope": ("llama", {"rope_parameters": {**LONGROPE, "factor": 8.0}}),
    "llama-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
            "max_position_embeddings": TRAINED,
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": TRAINED,
            }
        },
    ),
    "qwen3-yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": TRAINED,
            },
            "max_position_embeddings": TRAINED,
        },
    ),
}
LENGTHS = {"before": 20, "across": TRAINED - 20, "up to": TRAINED, "one beyond": TRAINED + 1, "beyond": 100}
COUNT = 40
TIDAL = "tidal:budget=300,full=0,select=1"

every_scaling = pytest.mark.parametrize("scaling", SCALED)
every_length = pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    monkeypatch.setattr(loop, "CHUNK", 32)


def model(scaling: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model that has seen no other length: with `dynamic`, transformers keeps the frequencies of the longest."""
    name, overrides = SCALED[scaling]
    return tiny.__wrapped__(name, dtype, **overrides)


def prompt_of(length: int) -> list[int]:
    return random_tokens(length, seed=length)


@cache
def by_transformers(scaling: str, length: int, dtype: torch.dtype = torch.float64) -> list[int]:
    ids = torch.tensor([prompt_of(length)])
    mask = torch.ones_like(ids)
    out = model(scaling, dtype).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=COUNT)
    return out[0, length:].tolist()


@every_scaling
@every_length
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_greedy_equals_transformers(scaling, length, dtype):
    expected = by_transformers(scaling, length, dtype)
    assert len(set(expected)) > 2, "the tiny model must not repeat one token"
    assert Engine(model(scaling, dtype)).generate(prompt_of(length), max_tokens=COUNT).token_ids == expected


@every_scaling
def test_a_batch_equals_each_alone(scaling):
    lengths = [*LENGTHS.values()]
    outputs = Engine(model(scaling)).generate([prompt_of(length) for length in lengths], max_tokens=COUNT)
    assert [out.token_ids for out in outputs] == [by_transformers(scaling, length) for length in lengths]


@every_scaling
@pytest.mark.parametrize("length", [LENGTHS["across"], LENGTHS["beyond"]])
@pytest.mark.parametrize("policy", ["dense", TIDAL, f"{TIDAL},correct=5"])
def test_drafts_and_policies_that_read_all_change_nothing(scaling, length, policy):
    expected = by_transformers(scaling, length)
    for drafter in (Lookup(), Guesses([[*prompt_of(length), *expected]], "mixed")):
        engine = Engine(model(scaling), policy=policy, drafter=drafter, adaptive=False)
        assert engine.generate(prompt_of(length), max_tokens=COUNT).token_ids == expected


@every_scaling
@every_length
def test_scores_are_those_of_one_pass_over_the_prompt_and_of_decoding(scaling, length):
    """The token after the prompt is predicted by one pass over it, and later ones as if they had been generated."""
    tokens = [*prompt_of(length), *by_transformers(scaling, length)]
    with torch.no_grad():
        whole = model(scaling)(torch.tensor([tokens[:length]]), use_cache=False).logits[0, -1]
    scores = Engine(model(scaling)).score(tokens, prefill=length)
    assert abs(scores[0] - whole.log_softmax(-1)[tokens[length]]) < 1e-6
    logits = torch.cat(list(Engine(model(scaling)).predictions(tokens, prefill=length)))
    assert logits.argmax(-1).tolist() == tokens[length:]


@every_scaling
@pytest.mark.parametrize(("first", "second"), [(20, 30), (20, 80), (100, 10), (50, 50)])
def test_a_second_turn_equals_one_long_prompt(scaling, first, second):
    engine = Engine(model(scaling))
    turn = engine.start(prompt_of(first), Sampling(max_tokens=20))
    list(engine.run([turn]))
    conversation = [*turn.tokens, *random_tokens(second, seed=5)]
    expected = engine.generate(conversation, max_tokens=COUNT).token_ids
    again = engine.start(conversation, Sampling(max_tokens=COUNT), reuse=turn)
    list(engine.run([again]))
    assert again.output == expected


@every_scaling
def test_a_shorter_prompt_after_a_longer_one(scaling):
    engine = Engine(model(scaling))
    for length in (150, 70, 100, 20):
        expected = by_transformers(scaling, length)
        engine.generate(prompt_of(200), max_tokens=2)
        assert engine.generate(prompt_of(length), max_tokens=COUNT).token_ids == expected


def test_the_context_reaches_as_far_as_the_scaling():
    limits = {scaling: Engine(model(scaling)).stack.spec.context_limit for scaling in SCALED}
    assert limits == {
        "phi3-longrope": 512,
        "llama-longrope": 512,
        "llama-dynamic": 8 * TRAINED,
        "llama3": 512,
        "qwen3-yarn": 4 * TRAINED,
    }
