"""Training of DependencyViT: objectives, their models and folders, and the command line."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from springtide.errors import SpringtideError
from springtide.training.progress import Steps
from springtide.training.running import make_folder
from springtide.training.trainer import Trainer, train
from springtide.vision import images
from springtide.vision.dependency_vit import (
    DependencyViTConfig,
    DependencyViTForImageClassification,
    DependencyViTForMaskedImageModeling,
)
from springtide.vision.folder import load_config, load_vit
from springtide.vision.images import DependencyViTImageProcessor, ImageFolder
from springtide.vision.training import dependency_vit as vision
from springtide.vision.training.dependency_vit import Ahead, LabelsObjective, MaskedObjective

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "prune_after": [1, 2],
}


class Bars:
    """Images of bars, four pixels from one to the next, which lie or stand, and noise."""

    classes = ("lying", "standing")
    digest = "bars"

    def batch(self, step, size, seed):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        labels = torch.randint(2, (size,), generator=generator)
        images = torch.randn(size, 3, 16, 16, generator=generator) / 4
        for image, label in zip(images, labels, strict=True):
            (image if label else image.mT)[..., ::4] += 1
        return images, labels

    def held_out(self, limit):
        return self.batch(10**6, limit, 0)


def config(**options) -> DependencyViTConfig:
    plain = DependencyViTConfig(**TINY, **options)
    return vision.adapted(plain, Bars.classes, options.get("keep", 1.0), options.get("prune_by"), {"seed": 0})


def labels_objective(**options) -> LabelsObjective:
    torch.manual_seed(0)
    return LabelsObjective(DependencyViTForImageClassification(config(**options)))


def trainer(out, objective, steps=60) -> Trainer:
    return Trainer(objective, Ahead(Bars()), out, Steps(steps), batch=16)


# -- objectives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"attention": "forward", "head_selector": False, "controller": False}])
def test_it_learns_to_name(tmp_path, options):
    objective = labels_objective(**options)
    subject = trainer(tmp_path, objective)
    train(subject)
    result = subject.finish(*Bars().held_out(100))
    assert result["accuracy"] > 0.95
    assert (result["images"], result["held_out_images"]) == (60 * 16, 100)
    assert result["parameters"] == objective.model.num_parameters()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert list(records[0]) == ["step", "seconds", "images_per_second", "loss", "top1"]
    assert records[-1]["top1"] > records[0]["top1"]


def test_it_learns_to_paint(tmp_path):
    torch.manual_seed(0)
    objective = MaskedObjective(DependencyViTForMaskedImageModeling(config()))
    subject = trainer(tmp_path, objective)
    train(subject)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.85 * records[0]["loss"]  # much of it is noise
    assert subject.finish(*Bars().held_out(10))["accuracy"] is None


def test_most_patches_are_hidden_others_in_every_image(monkeypatch):
    objective = MaskedObjective(DependencyViTForMaskedImageModeling(config()))
    seen = []
    forward = objective.model.forward

    def watching(pixel_values, masked):
        seen.append(masked)
        return forward(pixel_values, masked)

    monkeypatch.setattr(objective.model, "forward", watching)
    objective.loss(*Bars().batch(0, 8, 0))
    assert seen[0].sum(1).tolist() == [10] * 8  # of 16
    assert len(seen[0].unique(dim=0)) > 1


def test_matrices_decay_and_nothing_else():
    objective = labels_objective()
    groups = objective.parameter_groups()
    assert [(group["weight_decay"], group.get("muon", False)) for group in groups] == [
        (0.05, True),
        (0.05, False),
        (0.0, False),
    ]
    assert [group["lr"] / objective.lr for group in groups] == [1, 0.2, 0.2]
    names = {id(parameter): name for name, parameter in objective.model.named_parameters()}
    matrices, ends, others = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert sorted([*matrices, *ends, *others]) == sorted(names.values())
    assert len(matrices) == 2 * 7  # qkv, proj, selector, two of the controller, two of the MLP
    assert set(ends) == {"vit.patches.weight", "classifier.weight"}
    assert all(name.endswith(("bias", "positions")) or "norm" in name for name in others)


def test_positions_tell_rows_and_columns():
    positions = vision.grid_positions(8, 64)
    assert positions.shape == (64, 64)
    near = torch.cdist(positions, positions).topk(3, largest=False).indices[27]  # of row 3, column 3
    assert near[0] == 27 and set(near[1:].tolist()) <= {19, 26, 28, 35}
    assert torch.allclose((positions[:-1] * positions[1:]).sum(1).view(-1)[:7], (positions[0] @ positions[1]).expand(7))
    model = vision.new_objective("labels", config()).model
    assert torch.equal(model.vit.positions[0], vision.grid_positions(4, 16))
    with pytest.raises(SpringtideError, match="a multiple of 4, not 6"):
        vision.grid_positions(4, 6)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first, second = (labels_objective(keep=0.4, prune_by="random") for _ in range(3))
    train(trainer(tmp_path / "whole", whole, steps=6))
    make_folder(tmp_path / "parts")
    part = trainer(tmp_path / "parts", first, steps=6)
    for _ in range(3):
        part.step()
    part.save()
    train(trainer(tmp_path / "parts", second, steps=6))
    found, expected = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_images_are_made_a_step_ahead(monkeypatch):
    data, subject = Bars(), Ahead(Bars())
    for step in (3, 4, 5, 2, 3):
        images, labels = subject.batch(step, 4, 7)
        expected = data.batch(step, 4, 7)
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])

    def broken(step, size, seed):
        raise SpringtideError("'a.png' is damaged.")

    monkeypatch.setattr(subject.data, "batch", broken)
    with pytest.raises(SpringtideError, match="damaged"):
        subject.batch(9, 4, 7)


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_for_from_pretrained(tmp_path):
    objective = labels_objective(keep=0.5, attention="forward")
    objective.save(tmp_path)
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    model = DependencyViTForImageClassification.from_pretrained(tmp_path)
    images = Bars().batch(0, 3, 0)[0]
    assert torch.equal(model(images).logits, objective.model(images).logits)
    assert (model.config.keep, model.config.attention, model.config.training) == (0.5, "forward", {"seed": 0})
    assert model.config.id2label == {0: "lying", 1: "standing"}
    processor = DependencyViTImageProcessor.from_pretrained(tmp_path)
    picture = Image.new("RGB", (40, 30), "white")
    assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"], torch.ones(1, 3, 16, 16))


def test_labels_after_masked_images(tmp_path):
    torch.manual_seed(0)
    painter = vision.new_objective("masked", config())
    painter.save(tmp_path)
    with pytest.raises(SpringtideError, match=r"lacks weights of a DependencyViTForImageClassification.*train such a"):
        load_vit(DependencyViTForImageClassification, tmp_path)
    objective = vision.new_objective("labels", load_config(tmp_path), tmp_path)
    found, expected = objective.model.vit.state_dict(), painter.model.vit.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.isfinite(objective.loss(*Bars().batch(0, 4, 0))[0])


def test_other_classes_get_a_head_of_their_own(tmp_path):
    labels_objective().save(tmp_path)
    three = vision.adapted(load_config(tmp_path), ["a", "b", "c"], 1.0, None, {})
    objective = vision.new_objective("labels", three, tmp_path)
    assert objective.model.classifier.out_features == 3
    assert objective.model.config.label2id == {"a": 0, "b": 1, "c": 2}


def test_folders_that_cannot_be_loaded(tmp_path):
    kind = DependencyViTForImageClassification
    with pytest.raises(SpringtideError, match=r"holds no config\.json"):
        load_vit(kind, tmp_path)
    labels_objective().save(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for content, message in (
        (json.dumps({**fields, "hidden_size": 32}), "has them in another size than its config.json says"),
        (json.dumps({**fields, "num_labels": 5, "id2label": {str(n): "x" for n in range(5)}}), "in another size"),
        (json.dumps({**fields, "patch_size": 5}), "Images of 16 pixels leave 1 over"),
        (json.dumps({**fields, "model_type": "llama"}), "holds a model of type 'llama', and no DependencyViT"),
        ("{", "config.json' cannot be read"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SpringtideError, match=message):
            load_vit(kind, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SpringtideError, match=r"The weights in .* cannot be read"):
        load_vit(kind, tmp_path)


# -- the command line ----------------------------------------------------------------------------------------------

SMALL = ["--data", "scenes", "--image-size", 16, "--steps", 0]


@pytest.fixture
def fit(run, tmp_path, monkeypatch):
    """Train in ``tmp_path / "out"``; returns the configuration, or what the command refused."""
    monkeypatch.setattr(vision, "HELD_OUT", 8)

    def fit(*arguments, out="out"):
        result = run("train", "dependency-vit", "--out", tmp_path / out, "--json", tmp_path / "out.json", *arguments)
        if result.code:
            return result
        assert result.out.startswith(f"Saved the model in {tmp_path / out}")
        return load_config(tmp_path / out)

    return fit


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ([], {"attention": "reversed", "head_selector": True, "controller": True, "prune_by": "controller", "keep": 1}),
        (["--attention", "forward"], {"attention": "forward", "head_selector": True, "controller": True}),
        (["--no-head-selector"], {"attention": "reversed", "head_selector": False, "controller": True}),
        (["--no-controller"], {"head_selector": True, "controller": False, "prune_by": "received"}),
        (
            ["--attention", "forward", "--no-head-selector", "--no-controller"],
            {"attention": "forward", "head_selector": False, "controller": False, "prune_by": "norm"},
        ),
        (["--keep", 0.36, "--prune-by", "random"], {"keep": 0.36, "prune_by": "random"}),
        (["--patch-size", 4], {"patch_size": 4, "image_size": 16, "hidden_size": 64}),
    ],
)
def test_flags_build_the_model_that_they_name(fit, tmp_path, options, fields):
    found = fit(*SMALL, *options)
    assert {name: getattr(found, name) for name in fields} == fields
    model = load_vit(DependencyViTForImageClassification, tmp_path / "out")
    attention = model.vit.layers[0].attention
    assert (attention.selector is not None, attention.controller is not None) == (found.head_selector, found.controller)
    assert attention.reverse == (found.attention == "reversed")


def test_train(fit, tmp_path, caplog):
    arguments = ["--data", "scenes", "--image-size", 16, "--steps", 3, "--batch", 4, "--seed", 5]
    found = fit(*arguments, "--keep", 0.5, "--lr", 0.002)
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content) == ["objective", "parameters", "images", "seconds", "held_out_images", "accuracy"]
    assert (content["objective"], content["images"], content["held_out_images"]) == ("labels", 12, 8)
    assert found.training == {
        "objective": "labels",
        "from": None,
        "data": "scenes",
        "steps": 3,
        "batch": 4,
        "lr": 0.002,
        "seed": 5,
    }
    fit(*arguments, "--keep", 0.4).refused("belongs to another --keep: choose another --out")
    fit(*arguments, "--objective", "masked").refused("belongs to another objective and --keep")
    fit(*arguments, "--objective", "masked", out="masked")
    assert json.loads((tmp_path / "out.json").read_text())["accuracy"] is None
    found = fit(*arguments[:2], "--steps", 1, "--batch", 4, "--from", tmp_path / "masked", out="tuned")
    assert (found.image_size, found.training["from"]) == (16, str(tmp_path / "masked"))


def test_a_seed_decides_the_weights(fit, tmp_path):
    weights = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(*SMALL, "--seed", seed, out=out)
        weights.append(load_vit(DependencyViTForImageClassification, tmp_path / out).vit.patches.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_folder_of_images(fit, tmp_path):
    for name, colour in (("night", "black"), ("snow", "white")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 16), colour).save(tmp_path / "images" / name / f"{number}.png")
    found = fit("--data", tmp_path / "images", "--image-size", 16, "--steps", 2, "--batch", 4)
    assert found.id2label == {0: "night", 1: "snow"}


@pytest.mark.parametrize("held_out", [True, False])
def test_damaged_images_cost_no_work(fit, tmp_path, held_out):
    for name in ("night", "snow"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (20, 16)).save(tmp_path / "images" / name / f"{number}.png")
    data = ImageFolder(tmp_path / "images", 16)
    number = int(data.held[0] if held_out else data.trained[images._order(len(data.trained), 0, 0)[-1]])
    bad = tmp_path / "images" / ("night", "snow")[number // 5] / f"{number % 5}.png"
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    arguments = ["--data", tmp_path / "images", "--image-size", 16, "--steps", 4, "--batch", 2]
    fit(*arguments).refused("is no image")
    assert (tmp_path / "out" / "checkpoint.pt").exists() != held_out  # held-out ones are read before the first step
    bad.write_bytes(good)
    fit(*arguments)


def test_one_class_is_none(fit, tmp_path):
    (tmp_path / "images" / "night").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / "night" / f"{number}.png")
    arguments = ["--data", tmp_path / "images", "--image-size", 16, "--steps", 1, "--batch", 2]
    fit(*arguments).refused("One class cannot be told from others; add more, or use --objective masked")
    fit(*arguments, "--objective", "masked", out="painter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nosuch"], "'nosuch' cannot be read"),
        (["--data", "empty"], "'empty' has no sub-folders"),
        (["--data", "lonely"], "holds one image, which cannot be both trained on and held out"),
        (["--data", "scenes", "--model", "huge"], "Unknown model 'huge': choose one of pocket, tiny, small"),
        (["--data", "scenes", "--image-size", 20], "Images of 20 pixels leave 4 over"),
        (["--data", "scenes", "--keep", 0], "A share of 0.0 of the tokens cannot be kept"),
        (["--data", "scenes", "--keep", 1.5], "A share of 1.5 of the tokens cannot be kept"),
        (["--data", "scenes", "--objective", "masked", "--keep", 0.5], "--objective masked keeps all tokens"),
        (["--data", "scenes", "--no-controller", "--prune-by", "controller"], "choose one of received, norm, random"),
        (["--data", "scenes", "--from", "empty"], "'empty' holds no config.json"),
        (["--data", "scenes", "--from", "empty", "--model", "pocket"], "leave out the options that set them"),
        (["--data", "scenes", "--from", "empty", "--no-controller"], "leave out the options that set them"),
        (["--data", "scenes", "--json", "no/such/out.json"], "there is no folder"),
    ],
)
def test_mistakes(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "lonely" / "one").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "lonely" / "one" / "0.png")
    run("train", "dependency-vit", "--out", "out", "--steps", 1, *options).refused(message)
    assert not any((tmp_path / "out").glob("*"))


def test_names_of_models():
    assert vision.new_config("pocket").hidden_size == 64
    assert vision.new_config("pocket").initializer_range == pytest.approx(0.1)
    assert vision.new_config("tiny", patch_size=8).num_tokens == 28 * 28
    assert vision.new_config("dependency_vit_small_patch16_224").hidden_size == 384
