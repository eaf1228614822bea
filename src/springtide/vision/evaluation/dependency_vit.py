"""What a DependencyViT is worth: accuracy, saliency, parts, pruning and cost, each beside its controls.

Models whose folders differ in nothing but the seed of their training are one row, with mean and standard deviation.
"""

from __future__ import annotations

import json
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from math import isqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from springtide.errors import SpringtideError
from springtide.evaluation.report import print_table
from springtide.files import replacing
from springtide.vision import tree
from springtide.vision.dependency_vit import SCORES, DependencyViTConfig, DependencyViTForImageClassification
from springtide.vision.folder import load_config, load_vit
from springtide.vision.images import LabelledData
from springtide.vision.scenes import SceneBatch, Scenes, scenes
from springtide.vision.training.dependency_vit import accuracy, scores
from springtide.vision.tree import Grid, Output, Saliency, salient

KEEPS = (0.84, 0.68, 0.52, 0.36)
TOKENS = (64, 256, 1024)  # of the images on which cost is measured
COSTED = (1.0, 0.36)  # shares kept there
TIMED = 8  # images that are timed at once
TURNS = 7
BETA = 0.3  # squared, of the F-measure of saliency: precision counts more than recall
LEVELS = 256  # thresholds of it
LOOKED_AT = 64  # scenes at once
OTHERS, OTHER_WORLD = 256, 2**40  # scenes on which controls are chosen, and their seed: neither trained on nor measured
PARTS = 3  # body, head, limbs
PLAIN = {"attention": "forward", "head_selector": False, "controller": False}
PLAIN_NAME = "plain ViT, untrained"

Classifier = DependencyViTForImageClassification
Metrics = dict[str, float]


# -- metrics --------------------------------------------------------------------------------------------------------


def iou(found: Tensor, wanted: Tensor) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = int((found | wanted).sum())
    return int((found & wanted).sum()) / union if union else 1.0


def precision_recall(values: Tensor, wanted: Tensor) -> Tensor:
    """Of what a map of values from 0 to 1 has at or above each of 256 levels, against a mask: ``[2, 256]``, fp64."""
    levels = (values * LEVELS).long().clamp(0, LEVELS - 1)
    chosen, right = (
        torch.bincount(own.flatten(), minlength=LEVELS).flip(0).cumsum(0).flip(0).double()
        for own in (levels, levels[wanted])
    )
    return torch.stack([right / chosen.clamp(min=1), right / wanted.sum().clamp(min=1)])


def best_f(curves: Sequence[Tensor]) -> float:
    """The best F-measure at any level, of the means over images of precision and recall."""
    precision, recall = torch.stack(list(curves)).mean(0)
    return float(((1 + BETA) * precision * recall / (BETA * precision + recall).clamp(min=1e-12)).max())


def adjusted_rand_index(first: Tensor, second: Tensor) -> float:
    """How far two labellings ``[n]`` agree (Hubert and Arabie, 1985): 1 if they part alike, about 0 by chance."""
    table = F.one_hot(first).double().mT @ F.one_hot(second).double()
    both, one, other, all_pairs = (
        float((counts * (counts - 1) / 2).sum()) for counts in (table, table.sum(1), table.sum(0), table.sum())
    )
    expected, most = one * other / max(all_pairs, 1.0), (one + other) / 2
    return (both - expected) / (most - expected) if most > expected else 1.0


def mean_part_iou(found: Tensor, wanted: Tensor) -> float:
    """The mean over true parts, which are labelled from 1, of the IoU with the found part that it goes with.

    Found parts, labelled from 1 too, go with true ones in the way that makes the mean best. 0 is the background.
    """
    true, own = int(wanted.max()), max(int(found.max()), int(wanted.max()))
    counts = F.one_hot(wanted.flatten(), true + 1).double().mT @ F.one_hot(found.flatten(), own + 1).double()
    union = counts.sum(1, keepdim=True) + counts.sum(0) - counts
    shares = (counts / union.clamp(min=1))[1:, 1:]
    pairings = torch.tensor(list(permutations(range(own), true)))
    return float(shares[torch.arange(true), pairings].mean(1).max())


# -- saliency -------------------------------------------------------------------------------------------------------


def readings(config: DependencyViTConfig) -> list[tree.By]:
    """By what the model may tell what is salient; the others are the same for all tokens."""
    if config.controller:
        return ["rollout", "messages", "received"]
    return ["rollout", "received"] if config.attention == "reversed" else ["rollout"]


def drawn(output: Output, reverse: bool) -> list[Tensor]:
    """How much attention tokens draw, as keys of the softmax, ``[B, N]``: in each layer, and in all of them."""
    layers = [mask.sum(2 if reverse else 1) for mask in output.attentions]
    return [*layers, torch.stack(layers).mean(0)]


@dataclass(frozen=True)
class Controls:
    """What saliency is compared with, as chosen on other scenes.

    ``centre [N]``: how often a token is foreground. ``layer`` and ``sign``: of the map among :func:`drawn` that finds
    the foreground best, -1 if tokens that draw little are the foreground.
    """

    centre: Tensor
    layer: int
    sign: int

    @classmethod
    def choose(cls, model: Classifier) -> Controls:
        config = model.config
        batch = _other_scenes(OTHERS, config.image_size)
        grid = Grid.of(batch.images, config.patch_size)
        centre = F.avg_pool2d(batch.foreground.float()[:, None], config.patch_size).mean((0, 1)).flatten()
        scores: dict[tuple[int, int], float] = defaultdict(float)
        for output, part in _looks(model, batch):
            for layer, values in enumerate(drawn(output, config.attention == "reversed")):
                for sign in (1, -1):
                    found = [salient(sign * row, grid).mask for row in values]
                    scores[layer, sign] += sum(map(iou, found, part.foreground))
        return cls(centre, *max(scores, key=lambda chosen: scores[chosen]))


@cache
def _other_scenes(count: int, size: int) -> SceneBatch:
    """The same ones for every model; see ``OTHERS``."""
    return scenes(torch.arange(count), OTHER_WORLD, size)


def _looks(model: Classifier, batch: SceneBatch) -> Iterator[tuple[Output, SceneBatch]]:
    """The model's output for a part of the scenes after the other, all tokens being kept."""
    for start in range(0, len(batch.images), LOOKED_AT):
        part = SceneBatch(*(values[start : start + LOOKED_AT] for values in vars(batch).values()))
        yield tree.look(model, part.images.to(model.device), keep=1.0), part


def saliency_of(
    model: Classifier, output: Output, grid: Grid, controls: Controls, generator: torch.Generator
) -> dict[str, list[Saliency]]:
    """The saliency of each image, by the model's readings and by the controls."""
    count = len(output.indices)
    attention = controls.sign * drawn(output, model.config.attention == "reversed")[controls.layer]
    return {
        **{by: tree.saliencies(output, grid, by) for by in readings(model.config)},
        "attention": [salient(row, grid) for row in attention],
        "centre": count * [salient(controls.centre, grid)],
        "random": [salient(row, grid) for row in torch.rand(count, grid.tokens, generator=generator)],
    }


# -- scenes ---------------------------------------------------------------------------------------------------------


def scene_metrics(model: Classifier, batch: SceneBatch) -> Iterator[Metrics | None]:
    """Saliency and parts of scenes; yields None after every one, and the result last.

    ``iou_*`` and ``max_f_*``: of saliency, mean IoU of the foreground by Otsu's threshold, and best F-measure.
    ``ari_*``: of parts, mean adjusted Rand index over the object's pixels, when the tokens that show it are given.
    ``miou_*``: of parts that mean the same in all images, inside the foreground that the model itself found.
    """
    grid, controls = Grid.of(batch.images, model.config.patch_size), Controls.choose(model)
    generator = torch.Generator().manual_seed(0)
    ious, curves, aris = (defaultdict[str, list[Any]](list) for _ in range(3))
    own = OwnParts(grid)
    for output, part in _looks(model, batch):
        found = saliency_of(model, output, grid, controls, generator)
        for name, maps in found.items():
            ious[name] += map(iou, (one.mask for one in maps), part.foreground)
            curves[name] += map(precision_recall, (one.map for one in maps), part.foreground)
        own.add(output, found["rollout"], tree.partitions(output, found["rollout"], PARTS))
        given = (F.avg_pool2d(part.foreground.float(), grid.patch) >= 0.5).flatten(1)
        hidden, subtrees = output.last_hidden_state.float().cpu(), tree.subtrees(output, given, PARTS)
        for number, tokens in enumerate(inside.nonzero()[:, 0] for inside in given):
            if len(tokens):
                labellings = {
                    "tree": subtrees[number, tokens] - 1,
                    "kmeans": tree.cluster(hidden[number, tokens], PARTS),
                    "places": tree.cluster(torch.stack([tokens // grid.columns, tokens % grid.columns], 1), PARTS),
                }
                pixels = part.foreground[number]
                for name, labels in labellings.items():
                    shown = _squares(grid, tokens, labels)[pixels]
                    aris[name].append(adjusted_rand_index(shown, part.parts[number][pixels].long()))
            yield None
    yield (
        {f"iou_{name}": mean(values) for name, values in ious.items()}
        | {f"max_f_{name}": best_f(values) for name, values in curves.items()}
        | {f"ari_{name}": mean(values) for name, values in aris.items()}
        | {f"miou_{name}": mean_part_iou(found, batch.parts.long()) for name, found in own.aligned().items()}
    )


def _squares(grid: Grid, tokens: Tensor, labels: Tensor) -> Tensor:
    """The labels ``[n]`` of some tokens as pixels ``[height, width]``, from 1; 0 elsewhere."""
    return grid.squares(torch.zeros(grid.tokens, dtype=torch.int64).scatter(0, tokens, 1 + labels))


class OwnParts:
    """The parts of the foregrounds that a model found, from many images."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.subtrees: list[tree.Parts] = []
        self.tokens: list[Tensor] = []
        self.features: list[Tensor] = []

    def add(self, output: Output, found: Sequence[Saliency], subtrees: Sequence[tree.Parts]) -> None:
        self.subtrees += subtrees
        for hidden, one in zip(output.last_hidden_state.float().cpu(), found, strict=True):
            self.tokens.append(one.foreground.nonzero()[:, 0])
            self.features.append(hidden[one.foreground])

    def aligned(self) -> dict[str, Tensor]:
        """Pixels ``[B, height, width]`` labelled alike in all images: by clusters of subtrees, and of tokens."""
        if not sum(map(len, self.tokens)):
            return {}
        labels = torch.split(tree.cluster(torch.cat(self.features), PARTS), [len(one) for one in self.tokens])
        return {
            "tree": torch.stack([self.grid.squares(row) for row in tree.align(self.subtrees, PARTS)]),
            "kmeans": torch.stack([_squares(self.grid, *pair) for pair in zip(self.tokens, labels, strict=True)]),
        }


# -- pruning --------------------------------------------------------------------------------------------------------


def pruned(model: Classifier, images: Tensor, labels: Tensor) -> Iterator[Metrics | None]:
    """``accuracy_SCORE_KEEP`` for every score and share; yields None after each, and the result last."""
    metrics, layers = {}, list[Any](model.vit.layers)
    for by in scores(model.config):
        for layer in layers:
            layer.prune_by = by
        for keep in KEEPS:
            torch.manual_seed(0)  # of random pruning
            metrics[f"accuracy_{by}_{keep}"] = accuracy(model, images, labels, keep)
            yield None
    for layer in layers:
        layer.prune_by = model.config.prune_by
    yield metrics


# -- cost -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What an image of ``tokens`` costs, of which the share ``keep`` is left at the end.

    ``macs``: multiply-accumulates of matrix products and convolutions. ``peak_bytes``: most bytes that tensors held
    at a time, weights not counted. ``ms``: median of several turns, an image of eight that are read at once.
    """

    tokens: int
    keep: float
    macs: int
    peak_bytes: int
    ms: float


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made in its block and still there; ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in {one._cdata: one for one in _storages(result)}.values():
            if storage._cdata not in given:
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def costs(models: Mapping[str, Classifier]) -> Iterator[dict[str, list[Cost]] | None]:
    """Of each model, at every number of tokens and share kept; yields None after every turn, and the result last.

    Models and shares take turns. Larger images have interpolated positions.
    """
    found: dict[str, list[Cost]] = {name: [] for name in models}
    contenders = [(name, keep) for name in models for keep in COSTED]
    for tokens in TOKENS:
        times = defaultdict[tuple[str, float], list[float]](list)
        for turn in range(TURNS + 1):
            for name, keep in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
                seconds = _seconds(models[name], _images(models[name], tokens, TIMED), keep)
                if turn:  # the first one warms up
                    times[name, keep].append(1e3 * seconds / TIMED)
            yield None
        for name, keep in contenders:
            images = _images(models[name], tokens, 1)
            with FlopCounterMode(display=False) as flops:
                models[name](images, keep=keep)
            with PeakMemory() as memory:
                models[name](images, keep=keep)
            cost = Cost(tokens, keep, flops.get_total_flops() // 2, memory.peak, median(times[name, keep]))
            found[name].append(cost)
    yield found


def _images(model: Classifier, tokens: int, count: int) -> Tensor:
    side = isqrt(tokens) * model.config.patch_size
    return torch.zeros(count, model.config.num_channels, side, side, device=model.device)


def _seconds(model: Classifier, images: Tensor, keep: float) -> float:
    started = time.perf_counter()
    model(images, keep=keep).logits.cpu()  # which waits for a GPU
    return time.perf_counter() - started


# -- all of it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Of a metric over seeds: ``values`` in the order of the folders; ``std`` is None of a single one."""

    mean: float
    std: float | None
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean(values), stdev(values) if len(values) > 1 else None, list(values))


@dataclass(frozen=True)
class Evaluation:
    """A model: those ``folders`` that differ only in the ``seeds`` of their training, and how it did on ``images``.

    ``prune_by``: what it was trained to keep tokens for. ``metrics``: ``accuracy``, and what :func:`pruned` and, on
    scenes, :func:`scene_metrics` give. A model without folders has random weights and is there for its costs.
    """

    model: str
    folders: list[str]
    seeds: list[int | None]
    parameters: int
    images: int
    prune_by: str
    metrics: dict[str, Spread]
    costs: list[Cost]


def grouped(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """The folders whose configurations differ in nothing but the seed of the training, by a name.

    That is the first one's, without its number where there are several.
    Raises SpringtideError for a folder that holds no DependencyViT.
    """
    groups = defaultdict[str, list[Path]](list)
    for folder in folders:
        content = load_config(folder).to_dict()
        content["training"] = (content.get("training") or {"folder": str(folder)}) | {"seed": None}
        groups[json.dumps(content, sort_keys=True)].append(folder)
    found: dict[str, list[Path]] = {}
    for group in groups.values():
        name = group[0].name.rstrip("0123456789").rstrip("-_.") if len(group) > 1 else group[0].name
        found[name if name and name not in found else str(group[0])] = group
    return found


def steps(folders: Sequence[Path], images: int, costed: bool) -> int:
    """About how often :func:`evaluate` yields before its result."""
    return len(folders) * (images + len(SCORES) * len(KEEPS)) + costed * len(TOKENS) * (TURNS + 1)


def evaluate(
    folders: Sequence[Path], data: LabelledData, limit: int, device: torch.device, costed: bool
) -> Iterator[list[Evaluation] | None]:
    """All there is to know about the models in folders; yields None for progress, and the result last.

    Args:
        data: whose images held out, ``limit`` at most, are measured. Parts and saliency are measured on scenes.
        costed: whether cost is measured too.

    Raises SpringtideError for folders without a classifier, and for one of other classes or image size than the data.
    """
    batch = data.held_out_scenes(limit) if isinstance(data, Scenes) else None
    images, labels = (batch.images, batch.labels) if batch else data.held_out(limit)
    groups = grouped(folders)
    models: dict[str, Classifier] = {}
    found = {}
    for name, group in groups.items():
        measured: list[Metrics] = []
        seeds: list[int | None] = []
        for folder in group:
            model = load_vit(Classifier, folder).to(device).eval()
            _check(model, folder, data, images)
            models.setdefault(name, model)
            prune_by = model.config.prune_by
            seeds.append((getattr(model.config, "training", None) or {}).get("seed"))
            metrics = {"accuracy": accuracy(model, images, labels, keep=1.0)}
            parts = [pruned(model, images, labels)]
            if batch:
                parts.append(scene_metrics(model, batch))
            for part in parts:
                for result in part:
                    metrics |= result or {}
                    yield None
            measured.append(metrics)
        spreads = {key: Spread.of([one[key] for one in measured]) for key in measured[0]}
        found[name] = Evaluation(
            name, [str(folder) for folder in group], seeds, model.num_parameters(), len(images), prune_by, spreads, []
        )
    if not costed:
        yield list(found.values())
        return
    if not any(PLAIN.items() <= model.config.to_dict().items() for model in models.values()):
        values = next(iter(models.values())).config.to_dict()
        config = DependencyViTConfig.from_dict({**values, **PLAIN, "prune_by": "norm"})
        models[PLAIN_NAME] = Classifier(config).to(device).eval()
        count = models[PLAIN_NAME].num_parameters()
        found[PLAIN_NAME] = Evaluation(PLAIN_NAME, [], [], count, 0, config.prune_by, {}, [])
    for measure in costs(models):
        yield [replace(found[name], costs=cost) for name, cost in measure.items()] if measure else None


def _check(model: Classifier, folder: Path, data: LabelledData, images: Tensor) -> None:
    names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    if names != data.classes:
        raise SpringtideError(
            f"'{folder}' knows other classes ({', '.join(names[:3])} ...) than the data has "
            f"({', '.join(data.classes[:3])} ...); give the --data that it was trained on."
        )
    if images.shape[-1] != model.config.image_size:
        raise SpringtideError(
            f"'{folder}' was trained on images of {model.config.image_size} pixels, the first model on "
            f"{images.shape[-1]}; evaluate them one by one."
        )


# -- tables and figure ----------------------------------------------------------------------------------------------


def show(results: Sequence[Evaluation]) -> None:
    """Print the metrics, a column for each model, then the costs."""
    measured = [result for result in results if result.metrics]
    names = dict.fromkeys(name for result in measured for name in result.metrics)
    print_table(
        [{"": name.replace("_", " "), **{r.model: _told(r.metrics.get(name)) for r in measured}} for name in names]
    )
    print_table(
        [
            {"model": result.model, "tokens": cost.tokens, "keep": cost.keep, "MMAC": cost.macs / 1e6}
            | {"peak MB": cost.peak_bytes / 1e6, "ms an image": cost.ms}
            for result in results
            for cost in result.costs
        ]
    )


def _told(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.3f}" + (f" ± {spread.std:.3f}" if spread.std is not None else "")


def plot(path: Path, results: Sequence[Evaluation]) -> None:
    """A PNG of accuracy by share of tokens kept, and of saliency where it was measured, beside its controls."""
    from matplotlib.figure import Figure

    measured = [result for result in results if result.metrics]
    salient = [result for result in measured if "iou_centre" in result.metrics]
    figure = Figure(figsize=(9, 4.2 * (1 + bool(salient))), layout="constrained")
    axes = figure.subplots(1 + bool(salient), 1, squeeze=False)[:, 0]
    for number, result in enumerate(measured):
        for by, line in ((result.prune_by, "-"), ("random", ":")):
            points = [result.metrics[name] for name in ("accuracy", *(f"accuracy_{by}_{keep}" for keep in KEEPS))]
            means, bars = [point.mean for point in points], [point.std or 0.0 for point in points]
            label = f"{result.model}, by {by}"
            axes[0].errorbar((1.0, *KEEPS), means, bars, None, line, color=f"C{number}", label=label)
    axes[0].invert_xaxis()
    axes[0].set(xlabel="share of tokens kept at the end", ylabel="accuracy")
    if salient:
        names = dict.fromkeys(name for result in salient for name in result.metrics if name.startswith("iou_"))
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            points = [result.metrics.get(name, Spread(0.0, None, [])) for result in salient]
            xs = [number + width * place for number in range(len(salient))]
            means, bars = [point.mean for point in points], [point.std or 0.0 for point in points]
            axes[1].bar(xs, means, width, yerr=bars, label=f"saliency by {name.removeprefix('iou_')}")
        middles = [number + 0.4 - width / 2 for number in range(len(salient))]
        axes[1].set_xticks(middles, [result.model for result in salient], rotation=20)
        axes[1].set(ylabel="mean IoU with the object's mask")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
