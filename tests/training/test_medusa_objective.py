"""Medusa heads learn the right tokens, and what is measured and saved is what they are."""

from __future__ import annotations

import json
import math
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from folders import save_model
from springtide.drafting.medusa import Medusa
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.loading import load
from springtide.model.stack import Stack
from springtide.training.medusa import DECAY, Medusa2Objective, MedusaObjective
from springtide.training.progress import Steps
from tiny import random_tokens, tiny

LENGTH, HEADS = 20, 3
TOKENS = torch.tensor([random_tokens(LENGTH, seed) for seed in (1, 2, 3)])
CYCLE = torch.tensor([[5, 9, 14, 3, 77, 20, 41, 8] * 5])
every_form = pytest.mark.parametrize("lm_head", ["full", "shared"])


def stack(name="qwen3", dtype=torch.float64):
    """One around a model of its own."""
    return Stack(deepcopy(tiny(name, dtype)))


def perturbed(objective, noise=0.1):
    """The objective with heads, and an adapter if there is one, that are no longer what they were at first."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in objective.parameter_groups():
            for parameter in group["params"]:
                parameter += (noise * torch.randn(parameter.shape, generator=generator)).bfloat16()
    return objective


def medusa1(name="qwen3", dtype=torch.float64, **options):
    return perturbed(MedusaObjective(stack(name, dtype), HEADS, **options))


def medusa2(name="qwen3", dtype=torch.float64, steps=8, **options):
    pytest.importorskip("peft")
    return Medusa2Objective(stack(name, dtype), Steps(steps), HEADS, **options)


@torch.no_grad()
def guesses(objective):
    """Logits ``[K, B, T, V]`` of the heads in the drafter, and ``[B, T, V]`` of the model."""
    own = objective.target
    hidden = objective.model.model(TOKENS).last_hidden_state
    heads = objective.drafter.heads
    cap = getattr(objective.model.config, "final_logit_softcapping", None)
    shared = [heads(row.float(), lambda x: objective.model.lm_head(x.to(objective.model.dtype))) for row in hidden]
    logits = torch.stack(shared, 1) / getattr(objective.model.config, "logits_scaling", 1.0)
    return logits if cap is None else cap * torch.tanh(logits / cap), torch.stack([own.head(row) for row in hidden])


def naive_loss(objective, tokens=TOKENS):
    logits, _ = guesses(objective)
    losses = []
    for head in range(HEADS):
        each = [
            -logits[head, row, at].double().log_softmax(-1)[tokens[row, at + head + 2]]
            for row in range(len(tokens))
            for at in range(LENGTH - head - 2)
        ]
        losses.append(torch.stack(each).mean().item())
    return losses


def train(objective, tokens, steps):
    optimizer = torch.optim.AdamW(objective.parameter_groups(), weight_decay=0.0)
    progress, losses = getattr(objective, "progress", Steps(steps)), []
    for _ in range(steps):
        loss, metrics = objective.loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        losses.append((loss.item(), metrics))
    return losses


# Medusa-1


@every_form
@pytest.mark.parametrize("name", ["qwen3", "granite", "gemma2"])
def test_head_k_learns_the_token_k_and_one_places_ahead(name, lm_head):
    objective = medusa1(name, lm_head=lm_head)
    loss, metrics = objective.loss(TOKENS)
    wanted = naive_loss(objective)
    assert [metrics[f"loss_{head}"] for head in (1, 2, 3)] == pytest.approx(wanted, rel=1e-4)
    assert loss.item() == pytest.approx(sum(DECAY ** (k + 1) * own for k, own in enumerate(wanted)), rel=1e-4)


def test_fresh_heads_begin_as_the_targets_own():
    objective = MedusaObjective(stack(), HEADS)
    logits, own = guesses(objective)
    for head in logits:
        torch.testing.assert_close(head.double(), own, atol=1e-4, rtol=1e-4)


@every_form
def test_accuracy_is_counted_against_the_targets_choices(lm_head):
    objective = medusa1(lm_head=lm_head)
    objective.calibrate(TOKENS)
    logits, own = guesses(objective)
    assert len(objective.accuracy) == HEADS and all(len(row) == 10 for row in objective.accuracy)
    for head in range(HEADS):
        hits = torch.zeros(10)
        for row in range(len(TOKENS)):
            for at in range(LENGTH - head - 1):
                # Row at + head + 1 has read the tokens up to there, of which the head knows those up to at.
                hits += logits[head, row, at].topk(10).indices == own[row, at + head + 1].argmax()
        wanted = hits / (len(TOKENS) * (LENGTH - head - 1))
        assert objective.accuracy[head] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert sum(map(sum, objective.accuracy)) > 0


def test_accuracy_of_many_windows_is_that_of_all_of_them():
    objective = medusa1()
    objective.calibrate(TOKENS)
    once = objective.accuracy
    objective.calibrate(TOKENS.repeat(7, 1))
    assert [x for row in objective.accuracy for x in row] == pytest.approx([x for row in once for x in row])


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss_and_leaves_the_target_alone(lm_head, dtype):
    objective = MedusaObjective(stack(dtype=dtype), HEADS, lm_head=lm_head, lr=1e-2)
    before = deepcopy(objective.model.state_dict())
    losses = train(objective, CYCLE, 40)
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1]["top1_1"] > 0.6 > losses[0][1]["top5_1"] >= losses[0][1]["top1_1"]
    assert all((value == before[name]).all() for name, value in objective.model.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.model.parameters())
    assert {parameter.dtype for parameter in objective.heads.parameters()} == {torch.float32}


def test_a_trained_drafter_drafts_what_the_target_says(tmp_path):
    """Text that the target wrote itself, by hidden states that it had while writing it."""
    target = stack(dtype=torch.float32)
    plain = Engine(target.model, adaptive=False)
    prompt = random_tokens(12)
    output = plain.generate(prompt, max_tokens=24).token_ids
    objective = MedusaObjective(target, HEADS, lr=1e-2)
    train(objective, torch.tensor([prompt + output]), 60)
    objective.calibrate(torch.tensor([prompt + output]))
    objective.save(tmp_path)
    drafter = Medusa.load(tmp_path)
    assert drafter.accuracy == objective.accuracy and drafter.base == target.fingerprint
    out = plain.drafting(drafter).generate(prompt, max_tokens=24)
    assert out.token_ids == output and out.stats.passes <= 12


def test_windows_that_are_too_short_for_the_heads():
    objective = medusa1()
    objective.loss(TOKENS[:, :5])
    with pytest.raises(SpringtideError, match="for 3 heads must hold 5 tokens or more"):
        objective.loss(TOKENS[:, :4])


def test_state_is_all_that_is_trained():
    first, second = medusa1(), MedusaObjective(stack(), HEADS)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert first.loss(TOKENS)[1] == second.loss(TOKENS)[1]


# Medusa-2


def test_heads_come_first_then_all():
    objective = medusa2(steps=8)
    heads, adapter = ([*group["params"]] for group in objective.parameter_groups())
    for step in range(8):
        objective.progress.step = step
        loss, metrics = objective.loss(TOKENS)
        loss.backward()
        assert all(parameter.grad is not None for parameter in heads)
        assert all((parameter.grad is not None) == (step >= 2) for parameter in adapter)
        assert ("loss_lm" in metrics) == (step >= 2)
        for parameter in (*heads, *adapter):
            parameter.grad = None


def test_every_linear_layer_of_the_target_is_adapted_and_its_heads_learn_faster():
    objective = medusa2()
    names = {name for name, module in objective.model.named_modules() if hasattr(module, "lora_A")}
    parts = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 4 * len(parts) and {name.rsplit(".")[-1] for name in names} == parts
    heads, adapter = objective.parameter_groups()
    assert heads["lr"] == 4 * adapter["lr"]
    assert {parameter.shape[0] for parameter in adapter["params"][::2]} == {32}
    assert objective.adapted.peft_config["default"].lora_alpha == 16
    trained = {id(parameter) for group in (heads, adapter) for parameter in group["params"]}
    assert all((id(p) in trained) == p.requires_grad for p in objective.model.parameters())


def test_the_joint_loss_adds_the_targets_own():
    objective = perturbed(medusa2())
    objective.progress.step = 2
    loss, metrics = objective.loss(TOKENS)
    with torch.no_grad():
        own = F.cross_entropy(objective.model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    heads = sum(DECAY ** (k + 1) * each for k, each in enumerate(naive_loss(objective)))
    assert metrics["loss_lm"] == pytest.approx(own.item())
    assert loss.item() == pytest.approx(own.item() + heads, rel=1e-4)


def gradients(objective, loss):
    """Of the heads' parameters, and of the adapter's."""
    groups = [group["params"] for group in objective.parameter_groups()]
    return [torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True) for own in groups]


@pytest.mark.parametrize(("given", "weight"), [(None, 0.2), (0.0, 0.0), (0.5, 0.5)])
def test_the_target_learns_what_heads_ask_of_it_at_their_weight_and_heads_at_full_weight(given, weight):
    objective = perturbed(medusa2(heads_weight=given))
    objective.progress.step = 2
    loss, _ = objective.loss(TOKENS)
    hidden = objective.read(TOKENS)
    own = F.cross_entropy(objective.decode(hidden)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    heads, _ = objective.heads_loss(hidden, TOKENS)
    of_heads, of_adapter = gradients(objective, loss)
    torch.testing.assert_close(of_heads, gradients(objective, heads)[0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(of_adapter, gradients(objective, own + weight * heads)[1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("given", "weight"), [(None, 0.01), (0.3, 0.3)])
def test_distilled_text_keeps_the_targets_distribution(given, weight):
    objective, original = medusa2(distilled=True, heads_weight=given), stack().model
    objective.progress.step = 5
    loss, metrics = objective.loss(TOKENS)
    assert metrics["loss_lm"] == pytest.approx(0, abs=1e-12), "a fresh adapter changes nothing"
    perturbed(objective)
    objective.progress.step = 5  # of 8, the first 2 for the heads: half of the others are over
    loss, metrics = objective.loss(TOKENS)
    with torch.no_grad():
        was, now = (model(TOKENS).logits.log_softmax(-1) for model in (original, objective.model))
    divergence = (was.exp() * (was - now)).sum(-1).mean()
    heads = sum(DECAY ** (k + 1) * each for k, each in enumerate(naive_loss(objective)))
    assert metrics["loss_lm"] == pytest.approx(divergence.item(), rel=1e-6) and divergence > 1e-3
    assert loss.item() == pytest.approx(divergence.item() + heads, rel=1e-4)
    hidden = objective.read(TOKENS)
    own = F.kl_div(objective.decode(hidden).log_softmax(-1), was, log_target=True, reduction="none").sum(-1).mean()
    wanted = own + weight * math.sin(math.pi / 4) * objective.heads_loss(hidden, TOKENS)[0]
    torch.testing.assert_close(gradients(objective, loss)[1], gradients(objective, wanted)[1], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joint_training_lowers_both_losses(dtype):
    losses = train(medusa2(dtype=dtype, steps=40, lr=3e-3), CYCLE, 40)
    assert losses[-1][1]["loss_1"] < 0.5 * losses[0][1]["loss_1"]
    assert losses[-1][1]["loss_lm"] < 0.8 * losses[10][1]["loss_lm"]


def test_a_resumed_run_goes_on_as_it_was():
    first = medusa2(dtype=torch.float32)
    train(first, TOKENS, 4)
    second = medusa2(dtype=torch.float32)
    second.load_state_dict(deepcopy(first.state_dict()))
    second.progress.load_state_dict(first.progress.state_dict())
    assert first.loss(TOKENS)[1] == second.loss(TOKENS)[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
def test_the_adapter_is_saved_in_pefts_format(tmp_path):
    peft = pytest.importorskip("peft")
    objective = perturbed(medusa2(dtype=torch.float32))
    objective.save(tmp_path)
    adapter = tmp_path / "adapter"
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (
        32,
        16,
        "LORA",
        "CAUSAL_LM",
    )
    assert config["base_model_name_or_path"] == ""
    merged = peft.PeftModel.from_pretrained(stack(dtype=torch.float32).model, str(adapter)).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, objective.model(TOKENS).logits, atol=0.03, rtol=0.03)


def test_a_saved_drafter_brings_its_adapter_to_the_loaded_model(tmp_path):
    folder = save_model(tmp_path / "model")
    objective = Medusa2Objective(load(folder).stack, Steps(4), HEADS, lr=3e-3)
    train(objective, CYCLE, 4)
    perturbed(objective)
    objective.calibrate(CYCLE)
    objective.save(tmp_path / "drafter")
    engine = load(folder, draft=tmp_path / "drafter")
    with torch.no_grad():
        got, plain = engine.stack.model(CYCLE).logits, load(folder).stack.model(CYCLE).logits
        wanted = objective.model(CYCLE).logits
    assert (got - wanted).abs().mean() < 0.1 * (plain - wanted).abs().mean()
    assert engine.drafter.accuracy == objective.accuracy
    undrafted = Engine(engine.stack.model).generate(CYCLE[0].tolist(), max_tokens=24).token_ids
    assert engine.generate(CYCLE[0].tolist(), max_tokens=24).token_ids == undrafted


def test_without_peft_medusa_2_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SpringtideError, match=r"needs the package peft; run `pip install 'springtide\[train\]'`"):
        Medusa2Objective(stack(), Steps(4))
