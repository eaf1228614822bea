"""Hidden Transfer learns from exactly what it will see in decoding, and changes nothing but its own maps."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch

from folders import VOCAB
from springtide.attention.policy import Policy
from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.model.stack import Stack
from springtide.rows.segment import Segment
from springtide.training.hidden_transfer import (
    HiddenTransferObjective,
    Reading,
    hits,
    sweep,
    visible,
)
from springtide.training.windows import Windows
from tiny import random_tokens, tiny

LENGTH = 30  # more than the sliding windows of 9
TOKENS = torch.tensor([random_tokens(LENGTH, seed) for seed in (1, 2)])


def objective(name="qwen3", layers=(1, 2, 2), dtype=torch.float64, noise=0.1, **options):
    """One with random maps, beside a model of its own."""
    made = HiddenTransferObjective(Stack(deepcopy(tiny(name, dtype))), layers, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (made.weight, made.bias):
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return made


def decoded(own, tokens):
    """Logits ``[K, V]`` that the engine gives the pseudo rows behind the last of ``tokens``."""
    stack, drafter = own.target, own.drafter.resolve(own.target)
    segment = Segment.chain(
        stack.new_cache(), 0, tokens.tolist(), "prompt", Policy(), outputs=1, drafter=drafter, draft=drafter.new_state()
    )
    with torch.inference_mode():
        drafter.commit(segment, *stack.forward([segment]), range(len(tokens)))
        return stack.head(stack.norm(segment.draft.last))


@pytest.mark.parametrize("layers", [(0, 1, 3), (1, 2, 2), (3, 3)], ids=str)
@pytest.mark.parametrize(
    ("name", "near"),
    # transformers' own Gemma 2, the one with a soft cap, rounds its softmax to fp32
    [("qwen3", 1e-8), ("llama", 1e-8), ("mistral", 1e-8), ("gemma3_text", 1e-8), ("smollm3", 1e-8), ("gemma2", 1e-4)],
)
def test_training_sees_what_decoding_sees(name, near, layers):
    own, anchors = objective(name, layers), torch.tensor([0, 11, 12, 26])
    with torch.no_grad():
        got = own.guess(Reading.of(own.model, TOKENS), anchors)
    for window, tokens in enumerate(TOKENS):
        for place, anchor in enumerate(anchors):
            expected = decoded(own, tokens[: anchor + 1])[: len(layers)]
            torch.testing.assert_close(got[:, window, place], expected, atol=near, rtol=0)


def test_the_teacher_is_the_target_itself():
    own, anchors = objective(), torch.tensor([3, 11])
    expected = own.model(TOKENS).logits
    got = own.teach(Reading.of(own.model, TOKENS), anchors)
    for step in (1, 2, 3):
        torch.testing.assert_close(got[step - 1], expected[:, anchors + step], atol=1e-12, rtol=0)


def test_the_loss_is_the_divergence_from_the_teacher_with_a_decay():
    own, anchors = objective(), torch.tensor([3, 11, 20])
    real = Reading.of(own.model, TOKENS)
    loss, metrics = own.loss_of(real, anchors)
    expected = 0.0
    for step in (1, 2, 3):
        p = own.teach(real, anchors)[step - 1].softmax(-1)
        q = own.guess(real, anchors)[step - 1].softmax(-1)
        divergence = (p * (p / q).log()).sum(-1).mean()
        assert metrics[f"loss_{step}"] == pytest.approx(divergence.item(), abs=1e-9)
        expected += 0.8**step * divergence
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_gradients_reach_the_maps_alone():
    own = objective()
    before = {name: weight.clone() for name, weight in own.model.named_parameters()}
    optimizer = torch.optim.AdamW(own.parameter_groups())
    loss, _ = own.loss(TOKENS)
    loss.backward()
    optimizer.step()
    assert own.weight.grad.abs().amax((1, 2)).min() > 0 and own.bias.grad.abs().amax(1).min() > 0
    assert all(weight.grad is None for weight in own.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in own.model.named_parameters())


def test_maps_begin_as_identities_and_learn():
    own = objective(dtype=torch.float32, noise=0.0)
    assert torch.equal(own.weight, torch.eye(32).expand(3, -1, -1)) and not own.bias.any()
    optimizer = torch.optim.AdamW(own.parameter_groups(), lr=1e-2)
    anchors, losses = torch.arange(27), []
    for _ in range(25):
        loss, _ = own.loss_of(Reading.of(own.model, TOKENS), anchors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_anchors_leave_room_for_the_teacher():
    own = objective(anchors=500)
    assert own.random_anchors(LENGTH).tolist() == list(range(LENGTH - 3))
    assert len(objective(anchors=5).random_anchors(LENGTH)) == 5


def test_calibration_counts_the_guesses_that_decoding_makes():
    own = objective(layers=(2, 3), anchors=LENGTH)
    own.calibrate(TOKENS)
    right = torch.zeros(2, 10, dtype=torch.float64)
    for tokens in TOKENS:
        wanted = own.model(tokens[None]).logits[0].argmax(-1)
        for anchor in range(LENGTH - 2):
            best = decoded(own, tokens[: anchor + 1]).topk(10).indices
            for step in range(2):
                right[step] += best[step] == wanted[anchor + step + 1]
    torch.testing.assert_close(torch.tensor(own.accuracy).double(), right / (2 * (LENGTH - 2)))
    assert right.sum() > 0


def test_hits_tell_the_guesses_of_each_step_apart():
    wanted = torch.eye(12)[[3, 4]][None, None]  # one step, one window, two rows
    guessed = torch.zeros_like(wanted)
    guessed[0, 0, 0, [3, 5]] = torch.tensor([2.0, 1.0])
    guessed[0, 0, 1, [5, 4]] = torch.tensor([2.0, 1.0])
    assert hits(guessed, wanted)[0, :3].tolist() == [0.5, 0.5, 0.0]


def test_what_pseudo_rows_see():
    """Rows (1, 1), (3, 1), (1, 2), (3, 2) of five real ones; in a window of two, each sees itself and one before."""
    seen = visible(torch.tensor([1, 3]), 2, 5, None).int().tolist()
    assert seen == [
        [1, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 1, 0],
        [1, 1, 1, 1, 0, 0, 1, 0, 1],
    ]
    assert visible(torch.tensor([1, 3]), 2, 5, 2).int().tolist() == [
        [0, 1, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 0, 1],
    ]


def test_cosines_by_depth():
    """Of identities, at the depth of the transfer: those of a real row with the ones that follow it."""
    own = objective(layers=(1, 3), noise=0.0, anchors=LENGTH)
    found = {(row["step"], row["depth"]): row["cosine"] for row in own.cosines(TOKENS)}
    assert sorted(found) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4)]
    states = own.model.model(TOKENS, output_hidden_states=True).hidden_states
    for step, layer in ((1, 1), (2, 3)):
        pairs = (states[layer][:, : LENGTH - 2], states[layer][:, step : LENGTH - 2 + step])
        expected = torch.nn.functional.cosine_similarity(*pairs, dim=-1).mean().item()
        assert found[step, layer] == pytest.approx(expected, abs=1e-9)


def test_what_was_trained_is_kept(tmp_path):
    own, other = objective(), objective(noise=0.0)
    other.load_state_dict(own.state_dict())
    assert torch.equal(own.weight, other.weight) and torch.equal(own.bias, other.bias)
    own.calibrate(TOKENS)
    own.save(tmp_path)
    loaded = HiddenTransfer.load(tmp_path).resolve(own.target)
    assert torch.equal(loaded.weight, own.weight.bfloat16().double()) and loaded.layers == (1, 2, 2)
    assert loaded.accuracy == own.accuracy


# The sweep


def test_a_sweep_measures_each_layer_and_step():
    windows = Windows(torch.tensor([random_tokens(LENGTH, seed) for seed in range(4)]))
    steps = list(sweep(Stack(deepcopy(tiny())), [1, 3], windows, TOKENS, steps=3, batch=2, ahead=2))
    assert steps[:-1] == [None] * 4
    assert [(row.layer, row.step) for row in steps[-1]] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for row in steps[-1]:
        assert len(row.accuracy) == 10 and row.top(2) == sum(row.accuracy[:2]) <= 1


def test_the_command_that_sweeps(run, folder, tmp_path):
    lines = [json.dumps({"tokens": random_tokens(400, seed, VOCAB)}) for seed in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    small = ("--model", folder, "--steps", 2, "--batch", 2, "--length", 32, "--steps-ahead", 2)
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("sweep", "hidden-transfer", "--data", tmp_path / "data.jsonl", *small, *files)
    assert (result.code, result.err) == (0, "") and "top-5" in result.out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["layer"], row["step"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert (tmp_path / "out.png").stat().st_size > 0
    run("sweep", "hidden-transfer", "--data", tmp_path / "data.jsonl", *small, "--layers", "2,4").refused("from 1 to 3")
