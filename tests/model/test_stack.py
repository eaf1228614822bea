"""The model is the user's: its weights and configuration stay as they are, and it stays usable."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import springtide
from folders import VOCAB
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
