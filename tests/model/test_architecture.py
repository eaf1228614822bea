"""What is known of architectures; that decoding is theirs is tested in tests/exactness."""

from __future__ import annotations

import pytest
import torch

from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.model.architecture import ARCHITECTURES, Architecture
from tiny import ARCHITECTURES as TINY
from tiny import random_tokens, tiny

PROMPT = random_tokens(37)


def test_every_architecture_is_tested():
    assert set(ARCHITECTURES) == set(TINY)


def test_others_are_refused_with_a_list():
    with pytest.raises(SpringtideError) as caught:
        Architecture.of("gpt2")
    assert str(caught.value).startswith("Architecture 'gpt2' is not supported; supported are Llama, Qwen2, ")
    assert all(architecture.name in str(caught.value) for architecture in ARCHITECTURES.values())


@pytest.mark.parametrize("name", ["llama", "granite", "cohere2", "gemma2"])
def test_scalings_of_other_architectures_are_not_applied(name):
    """Whatever stands in a configuration, the architecture's own code reads only what is its own."""
    scalings = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "logit_scale": 0.5, "final_logit_softcapping": 1.0}
    model = tiny(name, **{key: value for key, value in scalings.items() if not hasattr(tiny(name).config, key)})
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]
    stack = Engine(model).stack
    found = stack.peek(stack.read(PROMPT[:-1]), Policy(), PROMPT[-1:], [-1])[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_caps_are_those_of_the_configuration(cap):
    model = tiny("gemma2", final_logit_softcapping=cap)
    stack = Engine(model).stack
    logits = torch.tensor([[-10.0, 0.0, 10.0]])
    expected = logits if cap is None else torch.tensor([[-0.5, 0.0, 0.5]])
    torch.testing.assert_close(stack.scaled(logits), expected)


@pytest.mark.parametrize(("dtype", "wider"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_fp32_or_wider(name, dtype, wider):
    assert Engine(tiny(name)).stack.scaled(torch.ones(1, 3, dtype=dtype)).dtype == wider
