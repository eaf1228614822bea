"""The model is the user's: its weights and configuration stay as they are, and it stays usable."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import springtide
from folders import VOCAB
from springtide.attention.calibration import VERSION
from springtide.engine.engine import Engine
from tiny import random_tokens, tiny


def test_the_configuration_stays_as_it_was():
    model = tiny("qwen3")
    before = model.config._attn_implementation
    Engine(model).generate(random_tokens(37), max_tokens=2)
    assert model.config._attn_implementation == before


def test_the_users_model_stays_usable(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([random_tokens(20, vocab=VOCAB)])
    before = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    springtide.load(model).generate(ids[0].tolist(), max_tokens=4)
    after = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert torch.equal(before, after)
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_rows_that_do_not_stay_are_as_the_state_of_their_sequence_has_them():
    engine = Engine(tiny("llama"), calibration={"version": VERSION, "tidal": {"full": [0], "select": [1]}})
    policy, tokens = engine.resolve("tidal:budget=64,means=4"), random_tokens(150)
    cache, state = engine.stack.read(tokens[:140]), policy.new_state()
    fresh = engine.stack.peek(cache, policy, tokens[140:], range(-1, 9))
    for _ in range(2):
        assert torch.equal(engine.stack.peek(cache, policy, tokens[140:], range(-1, 9), state=state), fresh)
    assert cache.length == 140 and sorted(state.means) == [2, 3] and state.selected is None
