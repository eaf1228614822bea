"""What a DependencyViT is worth: metrics by hand, grouping by seed, costs, and the command line."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from springtide.errors import SpringtideError
from springtide.vision.dependency_vit import DependencyViTForImageClassification
from springtide.vision.evaluation import dependency_vit as vision
from springtide.vision.evaluation.dependency_vit import (
    Controls,
    Evaluation,
    PeakMemory,
    Spread,
    adjusted_rand_index,
    best_f,
    iou,
    mean_part_iou,
    precision_recall,
)
from springtide.vision.folder import load_vit
from springtide.vision.scenes import Scenes
from springtide.vision.training.dependency_vit import adapted, new_config, new_objective
from springtide.vision.tree import look

PLAIN = {"attention": "forward", "head_selector": False, "controller": False}


def save(folder, seed=0, keep=0.5, **options):
    """A small model for scenes of 32 pixels, 16 tokens, with random weights; returns its folder."""
    config = new_config("pocket", image_size=32, hidden_size=16, num_hidden_layers=2, prune_after=[1, 2], **options)
    torch.manual_seed(seed)
    new_objective("labels", adapted(config, Scenes().classes, keep, None, {"steps": 0, "seed": seed})).save(folder)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Costs and controls of a few images."""
    monkeypatch.setattr(vision, "TOKENS", (16, 64))
    monkeypatch.setattr(vision, "TURNS", 1)
    monkeypatch.setattr(vision, "OTHERS", 6)
    monkeypatch.setattr(vision, "LOOKED_AT", 4)


# -- metrics -------------------------------------------------------------------------------------------------------


def test_iou():
    first, second = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert iou(first, second) == pytest.approx(1 / 3)
    assert iou(first, first) == 1
    assert iou(first, ~first) == 0
    assert iou(torch.zeros(4).bool(), torch.zeros(4).bool()) == 1


def test_the_best_f_measure():
    values, wanted = torch.tensor([[0.9, 0.6], [0.6, 0.1]]), torch.tensor([[True, True], [False, False]])
    curves = precision_recall(values, wanted)
    assert curves.shape == (2, 256)
    # All four pixels are at level 0 or above, three at 0.5, one at 0.8, none at the highest.
    for level, expected in ((0.0, (0.5, 1)), (0.5, (2 / 3, 1)), (0.8, (1, 0.5)), (0.999, (0, 0))):
        assert curves[:, int(256 * level)].tolist() == pytest.approx(expected)
    # (1 + 0.3) P R / (0.3 P + R): 0.565, 0.722 and 0.8125
    assert best_f([curves]) == pytest.approx(1.3 * 0.5 / 0.8)
    # With an image that shows all at once, precision and recall are means: (1 + 1) / 2 and (0.5 + 1) / 2 at 0.8.
    assert best_f([curves, precision_recall(wanted.float(), wanted)]) == pytest.approx(1.3 * 0.75 / (0.3 + 0.75))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 2, 2], 1.0),
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),  # pairs: 1 in common of 2 and 1, of 6 in all: (1 - 1/3) / (3/2 - 1/3)
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 0], [1, 1, 1], 1.0),
        ([3], [1], 1.0),
    ],
)
def test_adjusted_rand_index(first, second, expected):
    assert adjusted_rand_index(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected)
    assert adjusted_rand_index(torch.tensor(second), torch.tensor(first)) == pytest.approx(expected)


def test_part_iou_with_the_best_pairing():
    wanted = torch.tensor([0, 0, 1, 1, 2, 2])
    assert mean_part_iou(torch.tensor([0, 0, 2, 2, 1, 1]), wanted) == 1
    # The first part is found as 3 with one pixel too many, the second as 1 with one too few: 2 / 3 and 1 / 2.
    assert mean_part_iou(torch.tensor([0, 0, 3, 3, 3, 1]), wanted) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert mean_part_iou(torch.zeros(6, dtype=torch.int64), wanted) == 0


# -- saliency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["reversed", "forward"])
def test_attention_that_tokens_draw(tmp_path, attention):
    model = load_vit(DependencyViTForImageClassification, save(tmp_path, **{**PLAIN, "attention": attention}))
    images = Scenes(32).batch(0, 2, 0)[0]
    output = look(model, images, keep=1.0)
    x = model.vit.layers[0].norm1(model.vit.embed(images) + model.vit.positions)
    query, key, _ = model.vit.layers[0].attention.qkv(x).view(2, 16, 3, 4, 4).permute(2, 0, 3, 1, 4)
    expected = (query @ key.mT / 2).softmax(-1).sum(2).mean(1)  # of all queries, what each key gets
    found = vision.drawn(output, attention == "reversed")
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)


def test_controls_are_chosen_on_other_scenes(tmp_path, small, monkeypatch):
    model = load_vit(DependencyViTForImageClassification, save(tmp_path))

    def drawn(output, reverse):
        """What layer 1 draws least attention to is where the image is bright, as the object will be."""
        tokens = nn.functional.avg_pool2d(seen.pop(0), 8).mean(1).flatten(1)
        return [torch.rand(tokens.shape), -tokens, torch.rand(tokens.shape)]

    batches, seen = [], []
    scenes = vision.scenes

    def bright(indices, seed, size):
        batch = scenes(indices, seed, size)
        batch.images.copy_(2.0 * batch.foreground[:, None] - 1)
        batches.append((indices, seed))
        seen.extend(torch.split(batch.images, vision.LOOKED_AT))
        return batch

    monkeypatch.setattr(vision, "scenes", bright)
    monkeypatch.setattr(vision, "drawn", drawn)
    controls = Controls.choose(model)
    assert (controls.layer, controls.sign) == (1, -1)
    assert batches[0][0].tolist() == list(range(6)) and batches[0][1] == vision.OTHER_WORLD
    foreground = scenes(*batches[0], 32).foreground
    assert controls.centre[5] == pytest.approx(foreground[:, 8:16, 8:16].double().mean().item())


# -- costs ---------------------------------------------------------------------------------------------------------


def test_peak_memory():
    x = torch.zeros(1000)
    with PeakMemory() as memory:
        y = x + 1
        z = y.view(10, 100).mT
        assert memory.now == 4000
        w = torch.cat([y, y])
        del y
        assert memory.now == 12000  # the view holds it
        del z, w
        x.add_(1)
    assert (memory.now, memory.peak) == (0, 12000)


def test_costs(tmp_path, small):
    names = {"all": {}, "plain": PLAIN}
    models = {
        name: load_vit(DependencyViTForImageClassification, save(tmp_path / name, **options)).eval()
        for name, options in names.items()
    }
    found = list(vision.costs(models))
    assert found[:-1] == [None] * 4
    for costs in found[-1].values():
        assert [(cost.tokens, cost.keep) for cost in costs] == [(16, 1.0), (16, 0.36), (64, 1.0), (64, 0.36)]
        assert all(cost.ms > 0 for cost in costs)
        for whole, part in (costs[:2], costs[2:]):
            assert part.macs < whole.macs and part.peak_bytes < whole.peak_bytes
    # Patches, two layers (four matrices of attention, eight of the MLP, scores and values), classifier.
    expected = 16 * 192 * 16 + 2 * (16 * 12 * 16**2 + 2 * 16 * 16 * 16) + 16 * 9
    assert found[-1]["plain"][0].macs == pytest.approx(expected, rel=0.03)  # and the mass, 16 x 16 a head
    assert models["all"].vit.layers[0].prune_by == "controller"


# -- all of it -----------------------------------------------------------------------------------------------------


def test_folders_that_differ_in_their_seed_are_one_model(tmp_path):
    first, second = save(tmp_path / "lite-0", 0), save(tmp_path / "lite-1", 1)
    other = save(tmp_path / "other" / "lite-0", 0, keep=0.4)
    plain = save(tmp_path / "plain3", 0, **PLAIN)
    assert vision.grouped([first, other, second, plain]) == {
        "lite": [first, second],
        "lite-0": [other],
        "plain3": [plain],
    }
    for folder in (first, second):  # made elsewhere: nothing tells why they differ
        content = json.loads((folder / "config.json").read_text())
        del content["training"]
        (folder / "config.json").write_text(json.dumps(content))
    assert list(vision.grouped([first, second])) == ["lite-0", "lite-1"]


def test_mean_and_standard_deviation():
    assert Spread.of([0.5]) == Spread(0.5, None, [0.5])
    assert Spread.of([0.5, 0.7]) == Spread(pytest.approx(0.6), pytest.approx(0.02**0.5), [0.5, 0.7])


def test_random_pruning_and_others_are_measured_alike(tmp_path):
    model = load_vit(DependencyViTForImageClassification, save(tmp_path)).eval()
    data = Scenes(32)
    found = [list(vision.pruned(model, *data.held_out(40)))[-1] for _ in range(2)]
    assert found[0] == found[1]
    assert {layer.prune_by for layer in model.vit.layers} == {"controller"}  # as before
    assert set(found[0]) == {f"accuracy_{by}_{keep}" for by in vision.SCORES for keep in vision.KEEPS}
    plain = load_vit(DependencyViTForImageClassification, save(tmp_path / "plain", **PLAIN)).eval()
    names = list(vision.pruned(plain, *data.held_out(4)))[-1]
    assert {name.split("_")[1] for name in names} == {"norm", "random"}


def test_eval(run, tmp_path, small):
    folders = [save(tmp_path / "lite-0", 0), save(tmp_path / "lite-1", 1), save(tmp_path / "other", keep=1.0)]
    result = run(
        *("eval", "dependency-vit", "--model", ",".join(map(str, folders)), "--images", 10),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    assert "lite" in result.out and "±" in result.out and "iou centre" in result.out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    lite, other, plain = content = json.loads((tmp_path / "out.json").read_text())
    assert all(list(row) == [field.name for field in fields(Evaluation)] for row in content)
    assert (lite["folders"], lite["seeds"]) == ([str(folder) for folder in folders[:2]], [0, 1])
    assert (lite["images"], lite["prune_by"], len(lite["costs"])) == (10, "controller", 4)
    saliency = {"rollout", "messages", "received", "attention", "centre", "random"}
    assert set(lite["metrics"]) == {
        "accuracy",
        *(f"accuracy_{by}_{keep}" for by in vision.SCORES for keep in vision.KEEPS),
        *(f"{metric}_{name}" for metric in ("iou", "max_f") for name in saliency),
        *(f"ari_{name}" for name in ("tree", "kmeans", "places")),
        *(f"miou_{name}" for name in ("tree", "kmeans")),
    }
    for spread in lite["metrics"].values():
        assert len(spread["values"]) == 2 and all(-0.5 <= value <= 1 for value in spread["values"])
    assert lite["metrics"]["iou_centre"]["std"] == 0
    assert other["metrics"]["accuracy"]["std"] is None
    assert (plain["model"], plain["folders"], plain["metrics"]) == ("plain ViT, untrained", [], {})


def test_a_plain_vit_among_the_models(run, tmp_path, small):
    folder = save(tmp_path / "vit", **PLAIN)
    run("eval", "dependency-vit", "--model", folder, "--images", 5, "--no-costs", "--json", tmp_path / "out.json")
    (only,) = json.loads((tmp_path / "out.json").read_text())
    assert {"iou_attention", "iou_rollout", "ari_tree", "miou_tree"} <= set(only["metrics"])
    assert not {"iou_messages", "iou_received"} & set(only["metrics"])
    assert only["costs"] == []


def test_mistakes(run, tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a")
    save(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    content = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(content | {"id2label": {str(n): str(n) for n in range(9)}}))
    for options, message in (
        (["--model", ","], "--model names no folder"),
        (["--model", "nosuch"], "'nosuch' holds no config.json"),
        (["--model", "a,empty"], "'empty' holds no config.json"),
        (["--model", "b"], "'b' knows other classes (0, 1, 2 ...) than the data has (disc body"),
        (["--model", "a", "--data", "nosuch"], "'nosuch' cannot be read"),
        (["--model", "a", "--plot", "no/such.png"], "there is no folder"),
    ):
        run("eval", "dependency-vit", "--images", 4, *options).refused(message)
    config = new_config("pocket", image_size=16)
    new_objective("labels", adapted(config, Scenes().classes, 1.0, None, {})).save(tmp_path / "c")
    run("eval", "dependency-vit", "--images", 4, "--model", "a,c").refused("'c' was trained on images of 16 pixels")


def test_images_that_are_no_scenes(small, tmp_path):
    class Pictures:
        classes = Scenes().classes

        def held_out(self, limit):
            return Scenes(32).batch(0, limit, 0)

    found = list(vision.evaluate([save(tmp_path)], Pictures(), 5, torch.device("cpu"), True))[-1]
    assert not [name for name in found[0].metrics if not name.startswith("accuracy")]
    Pictures.classes = ["a", "b"]
    with pytest.raises(SpringtideError, match="knows other classes"):
        list(vision.evaluate([tmp_path], Pictures(), 5, torch.device("cpu"), True))
