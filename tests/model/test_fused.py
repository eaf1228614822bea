"""Fused layers run where they can, and nowhere else; what they compute is compared in tests/exactness."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from springtide.engine.engine import Engine
from springtide.kernels import native
from springtide.model.fused import FUSED, FusedLayer
from tiny import tiny

pytestmark = pytest.mark.skipif(native.level() is None, reason="the C++ kernels are not in use")


@pytest.mark.parametrize("name", FUSED)
def test_every_layer_is_fused(name):
    assert all(Engine(tiny(name)).stack.fused)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "olmo2"])
def test_other_architectures_run_as_they_are(name):
    assert not any(Engine(tiny(name)).stack.fused)


def test_a_model_converted_later_runs_as_it_is():
    model = deepcopy(tiny("qwen3"))
    engine = Engine(model)
    expected = engine.generate([1, 2, 3], max_tokens=8).token_ids
    model.to(torch.float64)
    assert engine.generate([1, 2, 3], max_tokens=8).token_ids == expected


def test_weights_that_were_replaced_are_not_passed_over():
    model, other = deepcopy(tiny("qwen3")), deepcopy(tiny("qwen3"))
    engine = Engine(model)
    for changed in (model, other):
        projection = changed.model.layers[1].mlp.up_proj.weight
        projection.data = projection.data.roll(1, 0)
    assert (
        engine.generate([1, 2, 3], max_tokens=8).token_ids == Engine(other).generate([1, 2, 3], max_tokens=8).token_ids
    )


class Wrapped(nn.Linear):
    """A layer of somebody else's, such as an adapter."""


def test_changed_parts_are_not_passed_over():
    model = deepcopy(tiny("llama"))
    config, (first, second, *_) = model.config, model.model.layers
    projection = second.mlp.up_proj
    second.mlp.up_proj = Wrapped(projection.in_features, projection.out_features, bias=False)
    assert FusedLayer.of(first, config) and not FusedLayer.of(second, config)
    first.self_attn.register_forward_hook(lambda *_: None)
    assert not FusedLayer.of(first, config)
