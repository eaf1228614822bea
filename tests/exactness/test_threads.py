"""Several threads may use one model at once: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

import springtide
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from tiny import random_tokens, tiny

PROMPTS = [random_tokens(length, seed=length) for length in (30, 45, 9, 60)]


@pytest.fixture(autouse=True)
def switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def by_engine(model: PreTrainedModel) -> Callable[[list[int]], list[int]]:
    engine = Engine(model)
    return lambda prompt: engine.generate(prompt, max_tokens=24).token_ids


def by_drafting_engine(model: PreTrainedModel) -> Callable[[list[int]], list[int]]:
    engine = Engine(model, drafter=Lookup())
    return lambda prompt: engine.generate(prompt, max_tokens=24).token_ids


def by_engine_each(model: PreTrainedModel) -> Callable[[list[int]], list[int]]:
    return lambda prompt: Engine(model).generate(prompt, max_tokens=24).token_ids


def by_transformers(model: PreTrainedModel) -> Callable[[list[int]], list[int]]:
    def generate(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
        return model.generate(ids, custom_generate=springtide.hf_generate, **options)[0, len(prompt) :].tolist()

    return generate


@pytest.mark.parametrize("use", [by_engine, by_drafting_engine, by_engine_each, by_transformers])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "qwen3", "mixtral"])
def test_threads_on_one_model_get_what_they_get_alone(name, use):
    model = tiny(name)
    before = model.config._attn_implementation
    generate = use(model)
    expected = [generate(prompt) for prompt in PROMPTS]
    together = threading.Barrier(len(PROMPTS))

    def run(prompt: list[int]) -> list[list[int]]:
        together.wait()
        return [generate(prompt) for _ in range(3)]

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        outputs = list(threads.map(run, PROMPTS))
    assert outputs == [[tokens] * 3 for tokens in expected]
    assert model.config._attn_implementation == before
