"""LongSpec learns from what it will see in decoding, never from the target's own answer, and changes nothing else."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from springtide.attention.policy import Policy
from springtide.drafting.drafter import View
from springtide.drafting.longspec import Growing, LongSpec
from springtide.errors import SpringtideError
from springtide.model.stack import Stack
from springtide.training import longspec
from springtide.training.longspec import (
    ANCHORS,
    CUTS,
    TEMPERATURES,
    LongSpecObjective,
    Reading,
    default_length,
    fresh_block,
    norm_weight,
    placed,
)
from springtide.training.progress import Steps
from springtide.training.trainer import Trainer, train
from springtide.training.windows import Windows
from tiny import random_tokens, tiny

LENGTH = 30  # more than the sliding windows of 9, and than the drafter's own of 7
TOKENS = torch.tensor([random_tokens(LENGTH, seed) for seed in (1, 2)])
KINDS = ("plain", "anchor", "gaps")
GLOBAL = ["qwen3", "llama", "qwen2", "gemma2", "gemma3_text", "granite", "smollm3", "olmo2", "glm4", "cohere2"]


def objective(name="qwen3", dtype=torch.float64, noise=0.3, window=7, **options):
    """One with a random block, beside a model of its own."""
    made = LongSpecObjective(Stack(deepcopy(tiny(name, dtype))), window=window, **options)
    made.block.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.block.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return made


def reading(own, tokens=TOKENS, kind="plain", longest=LENGTH):
    return own.read(tokens, placed(len(tokens), tokens.shape[1], longest, kind))


def drafted(own, tokens, ahead):
    """Of a drafter that is asked behind ``tokens [n]`` and follows ``ahead``: its guesses and their shares by step.

    At each step it follows a wrong token beside the right one, in the same tree.
    """
    drafter = own.drafter.resolve(own.target)
    cache = own.target.read(tokens[:-1].tolist())
    tree = Growing(View(tokens.tolist(), 9, drafter.new_state(), cache, Policy(), None))
    found = []
    with torch.inference_mode():
        for step, token in enumerate([*ahead.tolist(), 0][: own.steps]):
            guesses, shares = drafter.guess([tree], step)
            found.append((guesses[0][-1], shares[0][-1]))
            tree.parents += [tree.frontier[-1]] * 2
            tree.tokens += [(token + 1) % 97, token]
            tree.odds += [1.0, 1.0]
            tree.frontier = [len(tree.tokens) - 2, len(tree.tokens) - 1]
    return found


# What it sees


@pytest.mark.parametrize("name", GLOBAL)
def test_training_sees_what_decoding_sees(name):
    own = objective(name)
    with torch.no_grad():
        real, rows = reading(own), torch.arange(own.steps, LENGTH)
        logits = [own.guess(real, rows, torch.full((2,), step)) for step in range(1, own.steps + 1)]
    for window, tokens in enumerate(TOKENS):
        for root in (6, 13, LENGTH - 4):
            steps = drafted(own, tokens[: root + 1], tokens[root + 1 : root + own.steps])
            for step, (guesses, shares) in enumerate(steps):
                expected = logits[step][window, root + step - own.steps].softmax(-1)
                torch.testing.assert_close(torch.tensor(shares), expected.float()[guesses], atol=2e-6, rtol=0)
                assert guesses == expected.topk(len(guesses)).indices.tolist()


def changes(own, step, slots):
    """Which rows' guesses, a step ahead, depend on the target's keys and values at ``slots``."""
    rows = torch.arange(own.steps, LENGTH)
    real = reading(own)
    keys, values = real.keys.clone(), real.values.clone()
    keys[:, :, slots], values[:, :, slots] = 3.0, -2.0
    with torch.no_grad():
        before, after = (
            own.guess(r, rows, torch.full((2,), step)) for r in (real, replace(real, keys=keys, values=values))
        )
    return {row for row, same in zip(rows.tolist(), (before == after).all(-1).all(0).tolist(), strict=True) if not same}


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_no_row_sees_the_targets_answer(step):
    """Of its own slot and later ones, and of the newest that are not cached yet; all before are seen."""
    own = objective()
    for slot in (5, 14, LENGTH - 5):
        assert changes(own, step, [slot]) == set(range(slot + step, LENGTH))
    assert changes(own, step, list(range(LENGTH - step, LENGTH))) == set()


def test_a_row_that_saw_its_own_slot_would_be_found_out():
    assert 14 in changes(objective(), 0, [14])


def test_rows_see_a_window_of_tokens_and_no_later_ones():
    own = objective()
    rows = torch.arange(own.steps, LENGTH)
    real = reading(own)
    for place in (6, 15):
        embedded = real.embedded.clone()
        embedded[:, place] += 1.0
        with torch.no_grad():
            before, after = (own.guess(r, rows, torch.ones(2)) for r in (real, replace(real, embedded=embedded)))
        changed = ~(before == after).all(-1).all(0)
        assert rows[changed].tolist() == list(range(place, place + 7))


def test_each_sample_is_of_its_own_step():
    own = objective()
    real, rows = reading(own), torch.arange(own.steps, LENGTH)
    with torch.no_grad():
        mixed = own.guess(real, rows, torch.tensor([2, 4]))
        for sample, step in enumerate((2, 4)):
            alone = own.guess(real, rows, torch.full((2,), step))[sample]
            torch.testing.assert_close(mixed[sample], alone, atol=1e-10, rtol=0)


def test_the_reading_is_the_targets_own():
    own = objective("gemma3_text")
    out = own.model(TOKENS, output_hidden_states=True)
    real = reading(own)
    torch.testing.assert_close(own.teach(real, torch.tensor([3, 11])), out.logits[:, [3, 11]], atol=1e-12, rtol=0)
    torch.testing.assert_close(real.embedded, out.hidden_states[0], atol=0, rtol=0)
    cache = own.target.read(TOKENS[1].tolist())
    for got, expected in zip((real.keys, real.values), cache.read(3, 0, LENGTH), strict=True):
        torch.testing.assert_close(got[1], expected, atol=1e-10, rtol=0)


# Positions


@pytest.mark.parametrize("kind", KINDS)
def test_positions_ascend_below_the_longest(kind):
    torch.manual_seed(0)
    for longest in (LENGTH, LENGTH + 1, 500):
        positions = placed(64, LENGTH, longest, kind)
        assert positions.shape == (64, LENGTH) and not positions[:, 0].any()
        assert positions.diff().min() >= 1 and positions.max() < longest
        if kind != "plain" and longest == 500:
            assert positions.max() > 450, "up to the end"


def test_anchors_stay_and_all_others_are_moved_as_one():
    torch.manual_seed(0)
    plain, moved = torch.arange(LENGTH), placed(50, LENGTH, 400, "anchor")
    offsets = moved[:, -1] - plain[-1]
    assert len(offsets.unique()) > 40
    assert (moved[:, :ANCHORS] == plain[:ANCHORS]).all()
    assert (moved[:, ANCHORS:] == plain[ANCHORS:] + offsets[:, None]).all()


def test_gaps_are_several():
    torch.manual_seed(0)
    gaps = (placed(50, LENGTH, 400, "gaps").diff() > 1).sum(1)
    assert gaps.max() == CUTS and gaps.float().mean() > 2


def test_a_pure_shift_leaves_the_target_as_it_is():
    own = objective()
    plain = placed(2, LENGTH, LENGTH, "plain")
    rows = torch.arange(LENGTH)
    expected = own.teach(own.read(TOKENS, plain), rows)
    torch.testing.assert_close(own.teach(own.read(TOKENS, plain + 40), rows), expected, atol=1e-3, rtol=1e-3)
    offset = plain + 40 * (plain >= ANCHORS)
    moved = own.teach(own.read(TOKENS, offset), rows)
    torch.testing.assert_close(moved[:, :ANCHORS], expected[:, :ANCHORS], atol=1e-10, rtol=0)
    assert (moved[:, ANCHORS:] - expected[:, ANCHORS:]).abs().amax(-1).min() > 0.01, "anchors are further off"


def test_gaps_cut_nothing_off():
    """transformers takes gaps between positions for the ends of packed sequences, unless there is a cache."""
    own = objective()
    positions = placed(2, LENGTH, LENGTH, "plain") + 40 * (torch.arange(LENGTH) >= 9)
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1).expand(2, 1, -1, -1)
    expected = own.model(TOKENS, position_ids=positions, attention_mask=mask).logits
    got = own.teach(own.read(TOKENS, positions), torch.arange(LENGTH))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_how_far_samples_are_moved():
    assert objective().max_length == 512, "the model's positions"
    assert objective(max_length=64).drafter.trained == 64
    with pytest.raises(SpringtideError, match="--max-length is 513, but the model's context is 512 tokens"):
        objective(max_length=513)
    long = Stack(tiny("qwen3", max_position_embeddings=2**20))
    assert default_length(long) == 131_072


def test_a_model_without_a_layer_to_read_is_refused():
    with pytest.raises(SpringtideError, match="All layers of this model have a sliding window"):
        objective("mistral")


# Learning


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "cohere2", "starcoder2"])
def test_the_last_norm_begins_as_the_targets(name):
    model = deepcopy(tiny(name, torch.float64))
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.randn(32))
    scale = model.model.norm.weight.detach() + (name == "gemma2")
    torch.testing.assert_close(norm_weight(Stack(model)), scale.float(), atol=1e-4, rtol=1e-4)


def test_a_fresh_block_guesses_from_the_token_alone():
    stack = Stack(tiny())
    block = fresh_block(stack)
    own = LongSpecObjective(stack, window=7)
    with torch.no_grad():
        got = own.guess(reading(own), torch.arange(4, LENGTH), torch.ones(2))
        expected = stack.model.lm_head(block.norm(stack.embed(TOKENS[:, 4:])))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_divergence_from_the_target():
    own = objective()
    real, rows = reading(own), torch.tensor([5, 12, 20])
    steps = torch.tensor([1, 3])
    loss, metrics = own.loss_of(real, rows, steps)
    p, q = own.teach(real, rows).softmax(-1), own.guess(real, rows, steps).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean(1)
    assert [metrics["loss_1"], metrics["loss_3"]] == pytest.approx(divergence.tolist(), abs=1e-6)
    assert loss.item() == pytest.approx(divergence.mean().item(), abs=1e-6)
    assert set(metrics) == {f"{what}_{step}" for what in ("loss", "top1", "top5") for step in (1, 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_block_alone(kind):
    own = objective(positions=kind)
    before = {name: weight.clone() for name, weight in own.model.named_parameters()}
    optimizer = torch.optim.AdamW(own.parameter_groups())
    loss, _ = own.loss(TOKENS)
    loss.backward()
    optimizer.step()
    assert all(weight.grad.abs().max() > 0 for weight in own.block.parameters())
    assert all(weight.grad is None for weight in own.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in own.model.named_parameters())


def test_the_rows_of_large_batches_are_drawn(monkeypatch):
    monkeypatch.setattr(longspec, "ROWS", 12)
    own, seen = objective(), []
    monkeypatch.setattr(own, "loss_of", lambda real, rows, steps: seen.append((rows.tolist(), steps.tolist())))
    for _ in range(60):
        own.loss(TOKENS)
    assert all(len(rows) == 6 and rows == sorted(set(rows)) for rows, _ in seen)
    assert {row for rows, _ in seen for row in rows} == set(range(own.steps, LENGTH))
    assert {step for _, steps in seen for step in steps} == {1, 2, 3, 4}


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    own = LongSpecObjective(Stack(deepcopy(tiny())), positions="plain", window=7)
    optimizer, losses = torch.optim.AdamW(own.parameter_groups(), lr=1e-2), []
    rows = torch.arange(own.steps, LENGTH)
    for _ in range(40):
        loss, _ = own.loss_of(reading(own), rows, torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    windows = Windows(torch.tensor([random_tokens(LENGTH, seed) for seed in range(8)]))

    def trainer(name):
        torch.manual_seed(0)
        own = LongSpecObjective(Stack(deepcopy(tiny())), positions="gaps", window=7)
        return Trainer(own, windows, tmp_path / name, Steps(6), batch=2)

    whole, part = trainer("whole"), trainer("part")
    train(whole)
    part.out.mkdir()
    for _ in range(3):
        part.step()
    part.save()
    again = trainer("part")
    train(again)
    for got, expected in zip(again.objective.block.parameters(), whole.objective.block.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_calibration_counts_the_guesses_that_decoding_makes():
    own = objective()
    own.calibrate(TOKENS)
    right = torch.zeros(own.steps, 10, dtype=torch.float64)
    rows = range(own.steps, LENGTH)
    for tokens in TOKENS:
        wanted = own.model(tokens[None]).logits[0].argmax(-1)
        for row in rows:
            for step in range(own.steps):
                root = row - step
                guesses, _ = drafted(own, tokens[: root + 1], tokens[root + 1 : row + 1])[step]
                right[step] += torch.tensor(guesses) == wanted[row]
    torch.testing.assert_close(torch.tensor(own.accuracy).double(), right / (2 * len(rows)))
    assert right.sum() > 0


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_temperatures_make_shares_those_of_being_right(factor):
    """For what is ``factor`` times as sure as it should be."""
    own = objective(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4000, 97, generator=generator)
    choices = torch.distributions.Categorical(logits=logits).sample()
    own._readings = lambda tokens: [(TOKENS, None, None)]
    own.teach = lambda real, rows: torch.nn.functional.one_hot(choices, 97).float()
    own.guess = lambda real, rows, steps: factor * logits
    torch.manual_seed(0)
    own.calibrate(TOKENS)
    near = TEMPERATURES[(TEMPERATURES - factor).abs().argmin()].item()
    assert own.temperatures == pytest.approx([near] * own.steps, rel=0.1)


# What is kept


def test_what_was_trained_is_kept(tmp_path):
    own, other = objective(), objective(noise=0.0)
    other.load_state_dict(own.state_dict())
    own.calibrate(TOKENS)
    own.save(tmp_path)
    loaded = LongSpec.load(tmp_path).resolve(own.target)
    states = (own.block, other.block, loaded.block)
    for name, weight in states[0].state_dict().items():
        assert torch.equal(weight, states[1].state_dict()[name])
        assert torch.equal(weight.bfloat16().double(), states[2].state_dict()[name])
    assert (loaded.accuracy, loaded.temperatures) == (own.accuracy, tuple(own.temperatures))
    assert (loaded.window, loaded.trained) == (7, 512)


def test_training_goes_on_from_a_drafter(tmp_path):
    own = objective(steps=3, window=5, max_length=400)
    own.save(tmp_path)
    start = LongSpec.load(tmp_path)
    more = LongSpecObjective(own.target, positions="plain", max_length=LENGTH, start=start)
    assert (more.steps, more.window, more.drafter.trained) == (3, 5, 400)
    for got, expected in zip(more.block.parameters(), own.block.parameters(), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected.bfloat16().float())
    with pytest.raises(SpringtideError, match="another model of the same size"):
        LongSpecObjective(own.target, start=replace(start, base="0123456789abcdef"))


def test_a_reading_keeps_one_layer():
    own = objective()
    real = reading(own)
    assert isinstance(real, Reading) and real.keys.shape == (2, 2, LENGTH, 8)
