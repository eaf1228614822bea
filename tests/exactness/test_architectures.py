"""Dense decoding is the model's own: token for token what transformers generates."""

from __future__ import annotations

import pytest
import torch

from springtide.engine import loop
from springtide.engine.engine import Engine
from springtide.rows.sampling import Sampling
from tiny import ARCHITECTURES, random_tokens, tiny

GREEDY = {"max_tokens": 64}
PROMPT = random_tokens(37)

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def by_transformers(name: str, prompt: list[int], count: int = 64) -> list[int]:
    ids = torch.tensor([prompt])
    out = tiny(name).generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return out[0, len(prompt) :].tolist()


@every_architecture
def test_greedy_equals_transformers(name):
    expected = by_transformers(name, PROMPT)
    assert len(set(expected)) > 2, "the tiny model must not repeat one token"
    assert Engine(tiny(name)).generate(PROMPT, **GREEDY).token_ids == expected


@every_architecture
def test_logits_equal_transformers(name):
    engine = Engine(tiny(name))
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = tiny(name)(ids).logits[0].log_softmax(-1)
    targets = torch.tensor(PROMPT)
    expected = expected[4:-1].gather(1, targets[5:, None])[:, 0]
    torch.testing.assert_close(engine.score(PROMPT, prefill=5), expected, atol=2e-5, rtol=1e-4)


@every_architecture
def test_chunked_prefill_equals_whole(name, monkeypatch):
    whole = Engine(tiny(name)).generate(PROMPT, **GREEDY).token_ids
    monkeypatch.setattr(loop, "CHUNK", 7)
    assert Engine(tiny(name)).generate(PROMPT, **GREEDY).token_ids == whole


@every_architecture
def test_ragged_batch_equals_each_alone(name):
    engine = Engine(tiny(name))
    prompts = [random_tokens(length, seed=length) for length in (1, 5, 18, 33, 64)]
    batch = engine.generate(prompts, max_tokens=24)
    assert [out.token_ids for out in batch] == [engine.generate(prompt, max_tokens=24).token_ids for prompt in prompts]


@every_architecture
def test_second_turn_equals_one_long_prompt(name):
    engine = Engine(tiny(name))
    sampling = Sampling(max_tokens=16)
    first = engine.start(PROMPT, sampling)
    list(engine.run([first]))
    conversation = [*first.tokens, *random_tokens(9, seed=5)]
    second = engine.start(conversation, sampling, reuse=first)
    assert second.cache.length == len(first.tokens) - 1 or second.cache.length == len(first.tokens)
    list(engine.run([second]))
    assert second.output == engine.generate(conversation, max_tokens=16).token_ids


@every_architecture
def test_windows_are_read_from_the_configuration_as_the_layers_use_them(name):
    engine = Engine(tiny(name))
    passed = {}
    reads = engine.policy.reads

    class Spy(type(engine.policy)):
        def reads(self, layer, q, segment):
            passed[layer.index] = layer.window
            return reads(layer, q, segment)

    engine.policy = Spy()
    engine.generate(PROMPT, max_tokens=1)
    assert tuple(passed[i] for i in range(4)) == engine.stack.spec.windows
