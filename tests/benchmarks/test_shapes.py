"""Models with random weights are whole models of their shape."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from springtide import SpringtideError
from springtide.benchmarks import shapes
from tiny import random_tokens

SMALL = {
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 120,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every shape, shrunk."""
    monkeypatch.setattr(shapes, "SHAPES", {name: options | SMALL for name, options in shapes.SHAPES.items()})


@pytest.mark.parametrize("shape", list(shapes.SHAPES))
def test_it_computes_what_a_model_with_these_weights_computes(shape):
    model = shapes.random_engine(shape, 100, torch.float32).stack.model
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes.SHAPES[shape]), dtype=torch.float32).eval()
    whole.load_state_dict(model.state_dict())
    ids = torch.tensor([random_tokens(50)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits)


def test_weights_are_normal_and_repeatable():
    model, again = (shapes.random_engine("llama-8b", 100).stack.model for _ in range(2))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    for weight, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other)
        if weight.ndim == 1:
            assert (weight == 1).all()
        else:
            assert weight.float().std().item() == pytest.approx(0.02, rel=0.1)


def test_ties_and_context():
    tied = shapes.random_engine("llama-1b", 2**20)
    assert tied.stack.model.lm_head.weight is tied.stack.model.model.embed_tokens.weight
    assert tied.stack.spec.context_limit == 2**20
    assert shapes.random_engine("llama-1b", 100).stack.spec.context_limit == 131072
    alone = shapes.random_engine("llama-8b", 100).stack.model
    assert alone.lm_head.weight is not alone.model.embed_tokens.weight


def test_tidal_has_the_papers_layers(recwarn):
    """Two full and two selecting ones, scaled from 32 layers to 8."""
    policy = shapes.random_engine("llama-1b", 100).resolve("tidal")
    assert (policy.full, policy.select, policy.reselect) == ((0, 1), 2, (3,))
    assert not [warning for warning in recwarn if "tidal" in str(warning.message)]


def test_refusals():
    with pytest.raises(SpringtideError, match="Unknown shape 'gpt': choose one of llama-1b, llama-3b"):
        shapes.check_shape("gpt", 10)
    with pytest.raises(SpringtideError, match="1048577 tokens are too many"):
        shapes.check_shape("llama-1b", 2**20 + 1)
