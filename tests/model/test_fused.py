"""Fused layers run where they can, and nowhere else; what they compute is compared in tests/exactness."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from springtide.engine.engine import Engine
from springtide.kernels import native
from springtide.model.architecture import ARCHITECTURES
from tiny import tiny

FUSED = [name for name, architecture in ARCHITECTURES.items() if architecture.fused]

pytestmark = pytest.mark.skipif(native.level() is None, reason="the C++ kernels are not in use")


@pytest.mark.parametrize("name", FUSED)
def test_every_layer_is_fused(name):
    assert all(layer.block for layer in Engine(tiny(name)).stack.fused)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "olmo2"])
def test_other_architectures_run_as_they_are(name):
    assert not any(Engine(tiny(name)).stack.fused)


def test_another_activation_runs_as_it_is():
    """Where every layer could be fused but for the activation of its MLP."""
    model = tiny("llama", hidden_act="gelu")
    engine, ids = Engine(model), torch.tensor([[1, 2, 3]])
    assert not any(layer.block for layer in engine.stack.fused)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert generated(engine) == expected[0, 3:].tolist()


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


def swap(layer: nn.Module) -> None:
    """Another matrix of the same kind."""
    old = layer.mlp.up_proj
    layer.mlp.up_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def wrap(layer: nn.Module) -> None:
    """An adapter around a matrix, in the way of peft's."""
    old = layer.self_attn.v_proj
    layer.self_attn.v_proj = Wrapped(old.in_features, old.out_features, bias=False)


def swap_weight(layer: nn.Module) -> None:
    layer.self_attn.o_proj.weight = nn.Parameter(-layer.self_attn.o_proj.weight.detach())


def swap_norm(layer: nn.Module) -> None:
    layer.input_layernorm = deepcopy(layer.input_layernorm)
    layer.input_layernorm.weight.data.mul_(3)


def swap_mlp(layer: nn.Module) -> None:
    layer.mlp = deepcopy(layer.mlp)
    layer.mlp.down_proj.weight.data.neg_()


class OtherMLP(nn.Module):
    """One of another make."""

    def forward(self, x):
        return x.roll(1, -1)


def other_mlp(layer: nn.Module) -> None:
    layer.mlp = OtherMLP()


def hook(layer: nn.Module) -> None:
    layer.mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_before(layer: nn.Module) -> None:
    layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))


def patch(layer: nn.Module) -> None:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: -forward(x)


CHANGES = [swap, wrap, swap_weight, swap_norm, swap_mlp, other_mlp, hook, hook_before, patch]
every_change = pytest.mark.parametrize("change", CHANGES)


def generated(engine: Engine) -> list[int]:
    return engine.generate([1, 2, 3], max_tokens=8).token_ids


@every_change
@pytest.mark.parametrize("before", [True, False], ids=["before the engine was made", "after"])
def test_what_is_done_to_a_layer_is_not_passed_over(change, before):
    model, other = deepcopy(tiny("llama")), deepcopy(tiny("llama"))
    for each in (model, other):
        torch.manual_seed(1)
        if before or each is other:
            change(each.model.layers[2])
    engine = Engine(model)
    plain = generated(Engine(tiny("llama")))
    if not before:
        assert generated(engine) == plain
        torch.manual_seed(1)
        change(model.model.layers[2])
    ids = torch.tensor([[1, 2, 3]])
    expected = other.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert generated(engine) == expected[0, 3:].tolist() != plain


def test_another_layer_is_not_passed_over():
    model = deepcopy(tiny("llama"))
    engine = Engine(model)
    plain = generated(engine)
    model.model.layers[1] = deepcopy(model.model.layers[1])
    swap_weight(model.model.layers[1])
    assert generated(engine) == generated(Engine(deepcopy(model))) != plain


@every_change
def test_a_changed_layer_is_fused_where_it_can_be(change):
    """Again, too, after a change was taken back."""
    model = deepcopy(tiny("llama"))
    engine, layer = Engine(model), model.model.layers[2]
    hidden = torch.zeros(1, 32)
    change(layer)
    fused = engine.stack.fused[2]
    assert fused.takes(layer, hidden) == change.__name__.startswith("swap")
    model.model.layers[2] = deepcopy(tiny("llama")).model.layers[2]
    assert fused.takes(model.model.layers[2], hidden)


def test_a_hook_that_was_removed():
    model = deepcopy(tiny("llama"))
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    engine = Engine(model)
    assert not engine.stack.fused[0].takes(model.model.layers[0], torch.zeros(1, 32))
    handle.remove()
    assert engine.stack.fused[0].takes(model.model.layers[0], torch.zeros(1, 32))


def test_a_hook_on_the_head_is_not_passed_over():
    model = deepcopy(tiny("llama"))
    engine = Engine(model)
    plain = generated(engine)
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)
    assert generated(engine) != plain


def test_an_adapter_that_comes_and_goes():
    model = deepcopy(tiny("llama"))
    engine = Engine(model)
    plain = generated(engine)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    ids = torch.tensor([[1, 2, 3]])
    expected = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert generated(engine) == expected[0, 3:].tolist() != plain
    adapted.unload()
    assert generated(engine) == plain
    assert all(
        fused.takes(layer, torch.zeros(1, 32))
        for fused, layer in zip(engine.stack.fused, model.model.layers, strict=True)
    )
