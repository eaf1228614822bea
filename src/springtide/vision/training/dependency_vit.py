"""Trains DependencyViT: to name what images show, or to paint what is hidden of them, which needs no labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from springtide.errors import SpringtideError
from springtide.files import filling
from springtide.vision.dependency_vit import (
    MODELS,
    DependencyViTConfig,
    DependencyViTForImageClassification,
    DependencyViTForMaskedImageModeling,
    DependencyViTPreTrainedModel,
)
from springtide.vision.folder import Model, load_vit
from springtide.vision.images import DependencyViTImageProcessor, ImageFolder, LabelledData, digits
from springtide.vision.scenes import Scenes
from springtide.vision.tree import Grid

SIZES = {"pocket": "pocket_patch8_64", "tiny": "tiny_patch16_224", "small": "small_patch16_224"}

WEIGHT_DECAY = 0.05
LR = 5e-3  # of the layers' matrices, which learn with Muon: four times as fast as with AdamW in a small model
OTHERS_LR = 0.2  # of embeddings, norms, biases and heads, as a share of that
SPREAD = 0.8  # of initial weights, times the root of their inputs
WAVES = 10.0  # the longest wave in initial positions, over the shortest, which is 2 pi tokens long
HIDDEN = 0.6  # share of the patches that are to be painted
BATCH = 256  # images that are measured at a time
HELD_OUT = 2000  # images, at most, on which the result is measured


# -- data -----------------------------------------------------------------------------------------------------------


def find_data(name: str, image_size: int) -> LabelledData:
    """``"scenes"``, ``"digits"``, or a folder with one of images for each class; ``image_size``: pixels of a side.

    Raises SpringtideError for what is no such folder, and for digits without scikit-learn.
    """
    match name:
        case "scenes":
            return Scenes(image_size)
        case "digits":
            return digits(image_size)
        case _:
            return ImageFolder(Path(name), image_size)


class Ahead:
    """Images for the trainer, which are made ready in a thread of their own, a step ahead."""

    unit = "images"

    def __init__(self, data: LabelledData) -> None:
        self.data, self.digest = data, data.digest
        self._pool = ThreadPoolExecutor(1)
        self._next: dict[tuple[int, int, int], Future[tuple[Tensor, Tensor]]] = {}

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The images ``[size, 3, H, W]`` and labels ``[size]`` of a step."""
        wanted, after = (step, size, seed), (step + 1, size, seed)
        found = self._next.get(wanted) or self._pool.submit(self.data.batch, *wanted)
        self._next = {after: self._pool.submit(self.data.batch, *after)}
        return found.result()

    def count(self, images: Tensor) -> int:
        return len(images)


# -- models ---------------------------------------------------------------------------------------------------------


def new_config(name: str, **options: Any) -> DependencyViTConfig:
    """The configuration of a new model by its name or size, see ``MODELS``; ``options`` replace fields of it.

    Initial weights get the spread that suits the width.
    Raises SpringtideError for an unknown name, and for options that do not fit together.
    """
    found = MODELS.get(name, MODELS.get(f"dependency_vit_{SIZES.get(name)}"))
    if found is None:
        raise SpringtideError(f"Unknown model '{name}': choose one of {', '.join([*SIZES, *MODELS])}.")
    fields = {**found, **options}
    return DependencyViTConfig(**{"initializer_range": SPREAD * fields["hidden_size"] ** -0.5, **fields})


def grid_positions(side: int, size: int) -> Tensor:
    """Sines and cosines of rows and columns, ``[side * side, size]``.

    From learned positions that begin at random a small model takes several times as long to find out what is beside
    what. Raises SpringtideError unless ``size`` is a multiple of 4.
    """
    if size % 4:
        raise SpringtideError(f"Positions of rows and columns need a hidden_size that is a multiple of 4, not {size}.")
    frequencies = WAVES ** -(torch.arange(size // 4) / (size // 4))
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    angles = places[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def scores(config: DependencyViTConfig) -> list[str]:
    """By what tokens may be kept; a score that is the same for all of them is none. The first one suits best."""
    own = ["controller", "received"] if config.controller else ["received"] if config.attention == "reversed" else []
    return [*own, "norm", "random"]


def adapted(
    config: DependencyViTConfig, classes: Sequence[str], keep: float, prune_by: str | None, training: Mapping[str, Any]
) -> DependencyViTConfig:
    """The configuration for what is to be learnt, and how: ``training`` is recorded there.

    ``prune_by``: None for what suits best. Raises SpringtideError for what does not fit together.
    """
    useful = scores(config)
    if prune_by not in (None, *useful):
        raise SpringtideError(
            f"--prune-by {prune_by} cannot tell tokens apart in this model, all of which score alike; "
            f"choose one of {', '.join(useful)}."
        )
    found: DependencyViTConfig = DependencyViTConfig.from_dict(
        {
            **config.to_dict(),
            "keep": keep,
            "prune_by": prune_by or useful[0],
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "training": dict(training),
        }
    )
    return found


def identity(config: DependencyViTConfig) -> dict[str, Any]:
    """What tells a model from another, for the trainer's checkpoint, by the options that set it."""
    names = inspect.signature(DependencyViTConfig).parameters
    return {f"--{name.replace('_', '-')}": getattr(config, name) for name in names if name != "kwargs"}


def new_objective(
    name: str, config: DependencyViTConfig, start: Path | None = None
) -> LabelsObjective | MaskedObjective:
    """What learns by ``"labels"`` or from ``"masked"`` images, from random weights or those in the folder ``start``."""

    def model(kind: type[Model]) -> Model:
        if start is not None:
            return load_vit(kind, start, config)
        found = kind(config)
        found.base_model.positions.data.copy_(
            grid_positions(config.image_size // config.patch_size, config.hidden_size)
        )
        return found

    if name == "masked":
        return MaskedObjective(model(DependencyViTForMaskedImageModeling))
    return LabelsObjective(model(DependencyViTForImageClassification))


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Muon for the layers' matrices; weight decay for all matrices, not for biases, norms and positions."""
    matrices: list[Tensor] = []
    ends: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not name.endswith("weight"):
            others.append(parameter)
        else:
            (matrices if ".layers." in name else ends).append(parameter)
    return [
        {"params": matrices, "lr": lr, "weight_decay": WEIGHT_DECAY, "muon": True},
        {"params": ends, "lr": OTHERS_LR * lr, "weight_decay": WEIGHT_DECAY},
        {"params": others, "lr": OTHERS_LR * lr, "weight_decay": 0.0},
    ]


class VisionObjective:
    """What both objectives share: the model, all of which is trained."""

    name: str

    def __init__(self, model: DependencyViTPreTrainedModel, lr: float = LR) -> None:
        self.model = model.train()
        self.lr = lr
        self.accuracy: float | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.lr)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.model.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state)

    def save(self, folder: Path) -> None:
        """Write the model, and the processor of its images, for ``from_pretrained``."""
        with filling(folder) as temporary:
            self.model.save_pretrained(temporary)
            DependencyViTImageProcessor.square(self.model.config.image_size).save_pretrained(temporary)


class LabelsObjective(VisionObjective):
    """Cross-entropy of labels, with the share of tokens that the configuration keeps.

    A model that learned with a third of the tokens does as well with more; drawing a share in each step was no better.
    """

    name = "labels"

    def __init__(self, model: DependencyViTForImageClassification, lr: float = LR) -> None:
        super().__init__(model, lr)
        if model.config.num_labels < 2:
            raise SpringtideError("One class cannot be told from others; add more, or use --objective masked.")

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Of ``images [B, 3, H, W]`` and ``labels [B]``; ``top1``: the share that is named rightly."""
        found = self.model(images, labels=labels)
        return found.loss, {"top1": (found.logits.argmax(-1) == labels).double().mean().item()}

    def calibrate(self, images: Tensor, labels: Tensor) -> None:
        """Measure ``accuracy`` on images held out, with the share of tokens that the configuration keeps."""
        self.accuracy = accuracy(self.model, images, labels)


class MaskedObjective(VisionObjective):
    """60 % of the patches are hidden and painted from the others."""

    name = "masked"

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The mean absolute difference of hidden pixels, which go from -1 to 1; labels are not looked at."""
        tokens = Grid.of(images, self.model.config.patch_size).tokens
        masked = torch.rand(len(images), tokens).argsort(1) < round(HIDDEN * tokens)
        return self.model(images, masked=masked.to(images.device)).loss, {}

    def calibrate(self, images: Tensor, labels: Tensor) -> None:
        """There is no accuracy to measure."""


@torch.no_grad()
def accuracy(
    model: DependencyViTForImageClassification, images: Tensor, labels: Tensor, keep: float | None = None
) -> float:
    """Share of ``images [N, 3, H, W]`` whose best label is right; ``keep``: see ``forward_features``."""
    right = 0
    for part, wanted in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
        found = model(part.to(model.device), keep=keep).logits.argmax(-1)
        right += int((found.cpu() == wanted.cpu()).sum())
    return right / len(labels)
