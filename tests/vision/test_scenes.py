"""A scene depends on seed and index alone, and is what its masks and facts say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.vision import scenes as module
from springtide.vision.scenes import BODY, HEAD, LIMBS, NUMBERS, SHAPES, TEXTURES, Draws, Scenes, questions, scenes

SIZE = 64
numbers = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def many():
    return scenes(torch.arange(400), seed=1)


def fields(batch):
    return {**vars(batch), "labels": batch.labels, "foreground": batch.foreground}


def pieces(masks):
    """How many connected pieces each mask ``[B, H, W]`` has."""
    names = masks * torch.arange(1, masks[0].numel() + 1).view(masks[0].shape).float()
    while True:
        spread = F.max_pool2d(names[:, None], 3, stride=1, padding=1)[:, 0] * masks
        if torch.equal(spread, names):
            return torch.tensor([len(mask.unique()) - 1 for mask in names])
        names = spread


# -- chance --------------------------------------------------------------------------------------------------------


def test_draws_are_those_of_splitmix64():
    """The first numbers of the reference implementation with seed 0."""
    state, step, expected = 0, 0x9E3779B97F4A7C15, (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    for number in expected:
        assert module._mixed(torch.tensor(module._signed(state))).item() == module._signed(number)
        state += step


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=5), st.integers(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_draws_depend_on_index_seed_and_place(indices, seed, shape):
    count = torch.Size(shape).numel()
    draw = Draws(torch.tensor(indices), seed)
    found = torch.cat([draw(*shape).flatten(1), draw(3)], dim=1)
    assert found.dtype == torch.float64 and found.min() >= 0 and found.max() < 1
    for row, index in zip(found, indices, strict=True):
        assert torch.equal(row, Draws(torch.tensor([index]), seed)(count + 3)[0])


def test_draws_are_uniform_and_independent():
    found = torch.stack([Draws(torch.arange(500), seed)(20) for seed in range(3)])
    assert (found.flatten().histc(10, 0, 1) / found.numel() - 0.1).abs().max() < 0.01
    assert len(found.unique()) == found.numel()
    assert torch.corrcoef(found.transpose(0, 1).reshape(500, -1).T).fill_diagonal_(0).abs().max() < 0.25


# -- scenes --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.lists(numbers, min_size=1, max_size=20), st.integers(), st.data())
def test_a_scene_is_the_same_alone_and_in_any_batch(indices, seed, data):
    together = fields(scenes(torch.tensor(indices), seed, 32))
    one = data.draw(st.integers(0, len(indices) - 1))
    alone = fields(scenes(torch.tensor(indices[one : one + 1]), seed, 32))
    order = data.draw(st.permutations(range(len(indices))))
    shuffled = fields(scenes(torch.tensor(indices)[order], seed, 32))
    for name, values in together.items():
        assert torch.equal(values[one : one + 1], alone[name])
        assert torch.equal(values[order], shuffled[name])


def test_large_batches_are_no_exception(many):
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:261]
    found = scenes(order, seed=1)
    assert torch.equal(found.images, many.images[order]) and torch.equal(found.parts, many.parts[order])


def test_scenes_differ_by_index_and_by_seed(many):
    assert len(many.images.flatten(1).unique(dim=0)) == 400
    assert not (scenes(torch.arange(400), seed=2).images == many.images).flatten(1).all(dim=1).any()


def test_what_a_batch_holds(many):
    assert many.images.shape == (400, 3, SIZE, SIZE) and many.images.dtype == torch.float32
    levels = (many.images + 1) * 127.5
    assert levels.min() == 0 and levels.max() == 255 and (levels - levels.round()).abs().max() < 1e-4
    assert many.parts.shape == many.foreground.shape == (400, SIZE, SIZE)
    assert many.parts.dtype == torch.uint8 and many.foreground.dtype == torch.bool
    assert torch.equal(many.foreground, many.parts > 0)
    assert torch.equal(many.labels, 3 * many.body + many.head) and many.labels.dtype == torch.int64


def test_every_fact_is_as_likely_as_another(many):
    for values, first, count in (
        (many.labels, 0, 9),
        (many.texture, 0, len(TEXTURES)),
        (many.limbs, 1, 4),
        (many.distractors, 1, 4),
    ):
        shares = (values - first).bincount(minlength=count) / 400
        assert len(shares) == count and (shares - 1 / count).abs().max() < 0.07


def test_an_object_is_one_piece_of_body_head_and_limbs(many):
    few = slice(200)
    for mask in (many.foreground[few], many.parts[few] == HEAD):
        assert (pieces(mask.float()) == 1).all()
    assert (pieces((many.parts[few] == LIMBS).float()) == many.limbs[few]).float().mean() > 0.97
    assert (many.parts == BODY).flatten(1).any(dim=1).all()


def test_objects_can_be_seen_and_lie_anywhere(many):
    shares = many.foreground.float().mean(dim=(1, 2))
    assert shares.min() > 0.08 and shares.max() < 0.36 and 0.15 < shares.mean() < 0.22
    head = many.parts == HEAD
    assert head.any(dim=1).sum(dim=1).min() >= 10 and head.any(dim=2).sum(dim=1).min() >= 10
    masks = many.foreground.float()
    edges = torch.cat([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], dim=1)
    assert edges.mean() < 0.01, "wholly inside"
    prior = masks.mean(dim=0) > 0.25
    overlap = ((masks * prior).sum(dim=(1, 2)) / (masks + prior).clamp(max=1).sum(dim=(1, 2))).mean()
    assert overlap < 0.45, "the same guess for all is a poor one"


def test_distractors_can_be_counted(monkeypatch):
    """Painted white on black, the visible ones are as many as the facts say."""

    def white_on_black(draw, ground):
        black = torch.zeros_like(ground[:, 0])
        return [*4 * [black + 1], *6 * [black]]

    monkeypatch.setattr(module, "_colours", white_on_black)
    monkeypatch.setattr(module, "_ground", lambda draw: torch.zeros(len(draw.keys), 2, 3))
    found = scenes(torch.arange(200), seed=3)
    white = (found.images.amin(dim=1) > 0.5).float()
    assert (pieces(white) == found.distractors).float().mean() > 0.95
    assert not (white.bool() & found.foreground).any()


@pytest.mark.parametrize("size", [32, 128])
def test_a_scene_of_another_size_is_the_same_scene(many, size):
    other = scenes(torch.arange(50), seed=1, size=size)
    for name in ("labels", "limbs", "texture", "distractors"):
        assert torch.equal(getattr(other, name), getattr(many, name)[:50])
    scaled = F.interpolate(other.foreground[:, None].float(), SIZE, mode="area")[:, 0] > 0.5
    same = many.foreground[:50]
    assert ((scaled & same).sum(dim=(1, 2)) / (scaled | same).sum(dim=(1, 2))).min() > 0.85


# -- questions and data --------------------------------------------------------------------------------------------


def test_questions_have_the_facts_for_answers(many):
    for i in range(50):
        *asked, caption = questions(many, i)
        assert caption.kind == "caption"
        assert [question.kind for question in asked] == 3 * ["foreground"] + 2 * ["background"]
        assert [question.answer for question in asked] == [
            SHAPES[many.head[i]],
            SHAPES[many.body[i]],
            NUMBERS[many.limbs[i] - 1],
            TEXTURES[many.texture[i]],
            NUMBERS[many.distractors[i] - 1],
        ]
        for question in asked:
            assert question.text == question.text.lower() and question.answer.isalpha()


def test_every_step_has_new_scenes_and_held_out_ones_are_in_none():
    data = Scenes(32)
    images, labels = data.batch(0, 8, seed=5)
    assert images.shape == (8, 3, 32, 32) and labels.shape == (8,)
    parts = [data.batch(step, 4, seed=5) for step in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    held, of = data.held_out(8)
    assert torch.equal(data.held_out(3)[0], held[:3]) and torch.equal(data.held_out_scenes(8).labels, of)
    drawn = torch.cat([data.batch(0, 100, seed=seed)[0] for seed in range(3)]).flatten(1)
    assert len(torch.cat([drawn, held.flatten(1)]).unique(dim=0)) == 308


def test_classes_name_the_shapes(many):
    assert len(Scenes().classes) == 9
    for label, body, head in zip(many.labels[:50], many.body, many.head, strict=False):
        assert Scenes().classes[label] == f"{SHAPES[body]} body, {SHAPES[head]} head"
