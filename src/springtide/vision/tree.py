"""What a DependencyViT found in an image: a tree of its tokens, the object (saliency) and the object's parts.

:func:`tree`, :func:`saliency` and :func:`parts` take a model and one image. They are made of functions of the model's
output, which take batches: ask the model once, by :func:`look`, where more than one of them is wanted.
A tree is there by construction, whatever the model has learned: only comparison with controls shows what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from springtide.errors import SpringtideError
from springtide.vision.dependency_vit import DependencyViTPreTrainedModel

By = Literal["rollout", "messages", "received"]
"""By what tokens are salient: the function of that name below."""
Output = Any
"""A DependencyViTOutput, without the "or None" that every field of a transformers output has by its type."""

ROUNDS = 100  # of k-means, at most
TRIES = 8  # beginnings of k-means, of which the best is taken


class Grid(NamedTuple):
    """How an image is cut into tokens: ``rows`` by ``columns`` of squares of ``patch`` pixels, row by row."""

    rows: int
    columns: int
    patch: int

    @classmethod
    def of(cls, pixel_values: Tensor, patch: int) -> Grid:
        """The grid of images ``[..., height, width]``."""
        height, width = pixel_values.shape[-2:]
        return cls(height // patch, width // patch, patch)

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def smooth(self, values: Tensor) -> Tensor:
        """Values of tokens, ``[N]``, as pixels ``[height, width]``, bilinear."""
        size = (self.rows * self.patch, self.columns * self.patch)
        image = values.view(1, 1, self.rows, self.columns)
        return F.interpolate(image, size, mode="bilinear", align_corners=False)[0, 0]

    def squares(self, values: Tensor) -> Tensor:
        """Values of tokens, ``[N]``, as pixels ``[height, width]``, each token's square in one value."""
        image = values.view(self.rows, self.columns)
        return image.repeat_interleave(self.patch, 0).repeat_interleave(self.patch, 1)


# -- the output, for all N tokens -----------------------------------------------------------------------------------


def look(
    model: DependencyViTPreTrainedModel, pixel_values: Tensor, keep: float | None = None, masks: bool = True
) -> Output:
    """The model's output for images ``[B, 3, height, width]``, without gradients.

    ``keep``: share of the tokens that is left at the end (default: the configuration's). ``masks``: whether there are
    dependency masks, of which rollout, trees and parts are made.
    """
    with torch.no_grad():
        return model.base_model.forward_features(pixel_values, keep, output_attentions=masks)


def dependency(output: Output, tokens: int) -> Tensor:
    """How much each child gives to each parent over all layers, ``[B, N, N]`` (parent, child), of ``N = tokens``.

    The layers' masks ``A^M`` are summed, without what tokens give to themselves, and the parents of a child are scaled
    to sum to 1. The column of a token that gave nothing to others is zero.
    Raises SpringtideError for an output without ``attentions``.
    """
    masks, kept = _masks(output), output.kept
    batch = torch.arange(len(masks[0]), device=masks[0].device)[:, None, None]
    total: Tensor = masks[0].new_zeros(len(masks[0]), tokens, tokens)
    for mask, indices in zip(masks, kept, strict=True):
        total[batch, indices[:, :, None], indices[:, None, :]] += mask
    total.diagonal(dim1=1, dim2=2).zero_()
    return _ratio(total, total.sum(1, keepdim=True))


def layers(output: Output, tokens: int) -> Tensor:
    """How many layers each token went through, ``[B, N]``, int64; one more for those that were left at the end."""
    found: Tensor = output.indices.new_zeros(len(output.indices), tokens)
    for number, indices in enumerate((*output.kept, output.indices), start=1):
        found.scatter_(1, indices, number)
    return found


def messages(output: Output, tokens: int) -> Tensor:
    """How much each token still sends at the end, ``[B, N]``, fp32.

    Messages fade from layer to layer. One that was dropped is taken to fade on as those that stayed do on average:
    as it was when it left, it would outshine all of them.
    """
    found = torch.ones(len(output.indices), tokens, device=output.indices.device)
    for indices, sent in zip(output.kept, output.layer_messages, strict=True):
        found = found * _ratio(sent.sum(1, keepdim=True), found.gather(1, indices).sum(1, keepdim=True))
        found.scatter_(1, indices, sent.float())
    return found


def received(output: Output, tokens: int) -> Tensor:
    """The mass that each token receives, ``[B, N]``, mean over layers; a token that was dropped receives none."""
    found = torch.zeros(len(output.indices), tokens, device=output.indices.device)
    for indices, mass in zip(output.kept, output.received, strict=True):
        found.scatter_add_(1, indices, mass.float())
    return found / len(output.kept)


def rollout(output: Output, tokens: int) -> Tensor:
    """How much of the image's feature came from each token, ``[B, N]``, fp32; it sums to 1 over tokens.

    The feature is a mean of tokens, weighted by their messages. It is followed back through the dependency masks of all
    layers: a token came out of each as itself, of weight 1, and what its children gave it. This is attention rollout
    (Abnar and Zuidema, 2020); for a plain ViT it is exactly that.
    Raises SpringtideError for an output without ``attentions``.
    """
    masks = _masks(output)
    found = torch.zeros(len(masks[0]), tokens, device=masks[0].device)
    found.scatter_(1, output.indices, output.messages.float())
    for indices, mask in zip(reversed(output.kept), reversed(masks), strict=True):
        held = found.gather(1, indices)
        found.scatter_add_(1, indices, (held[:, None] @ mask.float())[:, 0])
    return _ratio(found, found.sum(1, keepdim=True))


def _masks(output: Output) -> tuple[Tensor, ...]:
    if output.attentions is None:
        raise SpringtideError("The output holds no dependency masks; call the model with output_attentions=True.")
    masks: tuple[Tensor, ...] = output.attentions
    return masks


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, zero for a part of nothing."""
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)


# -- the tree -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree of N tokens, on the CPU.

    Attributes:
        parents: ``[N]``, int64; -1 for the root.
        weights: ``[N]``, share of a token's messages that its parent got; 0 for the root.
        rank: ``[N]``, int64; 0 for the root, and each token's is above its parent's.
        messages: ``[N]``, how much the tokens still send.
    """

    parents: Tensor
    weights: Tensor
    rank: Tensor
    messages: Tensor

    @cached_property
    def order(self) -> list[int]:
        """The tokens by rank, so parents before their children."""
        order: list[int] = self.rank.argsort().tolist()
        return order

    @property
    def root(self) -> int:
        return self.order[0]

    @cached_property
    def children(self) -> list[list[int]]:
        """Of each token, by rank."""
        found: list[list[int]] = [[] for _ in self.order]
        for token in self.order[1:]:
            found[int(self.parents[token])].append(token)
        return found

    @cached_property
    def depths(self) -> Tensor:
        """``[N]``, int64: edges between each token and the root."""
        depths = torch.zeros_like(self.parents)
        for token in self.order[1:]:
            depths[token] = depths[self.parents[token]] + 1
        return depths

    @property
    def depth(self) -> int:
        return int(self.depths.max())

    @cached_property
    def sizes(self) -> Tensor:
        """``[N]``, int64: tokens in the subtree of each, itself counted."""
        sizes = torch.ones_like(self.parents)
        for token in self.order[:0:-1]:
            sizes[self.parents[token]] += sizes[token]
        return sizes

    def subtree(self, token: int) -> list[int]:
        """A token and all below it."""
        found = [token]
        for one in found:
            found += self.children[one]
        return found


def decode(dependency: Tensor, messages: Tensor, layers: Tensor | None = None) -> Tree:
    """The tree of one image: the parent of a token is the one, among those ranked above it, that gets most from it.

    Tokens are ranked by the ``layers [N]`` that they went through, if given (pruned ones come below kept ones), then by
    ``messages [N]``, then by what they get, ``dependency [N, N]`` (parent, child). So there is one root and no cycle.

    Ranking first costs weight: a token whose favourite is ranked below it takes another. Where ranks have nothing to do
    with masks, 64 tokens get 95 % of the weight of the best tree of all (Chu-Liu/Edmonds) if what a child gives is
    uniform, 90 % if it is the 4th power of that; nearly all of it where the highest ranked also receive most.
    """
    dependency, messages = dependency.cpu(), messages.cpu()
    order = torch.arange(len(messages))
    keys = [dependency.sum(1), messages] if layers is None else [dependency.sum(1), messages, layers.cpu()]
    for key in keys:  # the last one counts most, as sorting is stable
        order = order[key[order].argsort(descending=True, stable=True)]
    best, parent = dependency[order][:, order].triu(1).max(0)  # a child that gave nothing gets the root
    parents, weights, rank = torch.empty_like(order), torch.empty_like(best), torch.empty_like(order)
    parents[order], weights[order], rank[order] = order[parent], best, torch.arange(len(order))
    parents[order[0]] = -1
    return Tree(parents, weights, rank, messages)


def trees(output: Output, tokens: int) -> list[Tree]:
    """The tree of each image."""
    found = dependency(output, tokens), messages(output, tokens), layers(output, tokens)
    return [decode(*one) for one in zip(*found, strict=True)]


# -- saliency -------------------------------------------------------------------------------------------------------


def otsu(values: Tensor) -> float:
    """Otsu's threshold of ``values``: those above it and the others differ most (variance between the classes).

    It is the greatest value of the lower class; of equal values, that value, which none is above.
    """
    ordered = values.flatten().double().sort().values
    if ordered[0] == ordered[-1]:
        return ordered[0].item()
    below = torch.arange(1, len(ordered), device=ordered.device)
    above = len(ordered) - below
    sums = ordered.cumsum(0)
    # Among equal values this is convex, so the best cut is never inside them.
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return ordered[between.argmax()].item()


@dataclass(frozen=True, eq=False)
class Saliency:
    """What stands out in an image.

    Attributes:
        values: ``[N]``, fp32, on the CPU: 0 for the least salient token, 1 for the most; zeros if all are alike.
        threshold: what is above it is the foreground.
        grid: the tokens' places.
    """

    values: Tensor
    threshold: float
    grid: Grid

    @property
    def foreground(self) -> Tensor:
        """``[N]``, bool."""
        return self.values > self.threshold

    @property
    def map(self) -> Tensor:
        """``[height, width]``, fp32, bilinear."""
        return self.grid.smooth(self.values)

    @property
    def mask(self) -> Tensor:
        """The foreground's pixels, ``[height, width]``, bool."""
        return self.grid.squares(self.foreground)


def salient(values: Tensor, grid: Grid) -> Saliency:
    """Saliency by any values of tokens ``[N]``, scaled, with Otsu's threshold."""
    values = values.float().cpu()
    values = values - values.min()
    values = _ratio(values, values.max())
    return Saliency(values, otsu(values), grid)


def saliencies(output: Output, grid: Grid, by: By = "rollout") -> list[Saliency]:
    """The saliency of each image, by what reached its feature, what tokens still send, or what they received."""
    reading = {"rollout": rollout, "messages": messages, "received": received}[by]
    return [salient(row, grid) for row in reading(output, grid.tokens)]


# -- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parts:
    """The foreground of an image in parts.

    Attributes:
        labels: ``[N]``, int64, on the CPU: 0 for the background, parts from 1.
        features: ``[K, C]``, fp32: the mean features of each part's tokens, as far as they were left at the end, less
            the mean of the whole foreground; zeros for a part of which none was left.
        grid: the tokens' places.
    """

    labels: Tensor
    features: Tensor
    grid: Grid

    @property
    def map(self) -> Tensor:
        """The pixels' labels, ``[height, width]``, int64."""
        return self.grid.squares(self.labels)


def cut(tree: Tree, k: int) -> Tensor:
    """The parts, from 0 and by rank, of a tree that loses ``k - 1`` edges, ``[N]``, int64.

    The edge that goes next is the weakest one for the sizes ``a`` and ``b`` of what it would leave: that of the least
    ``weight (1/a + 1/b)``, the ratio cut. By mere weight, single leaves would come off one after the other.
    Raises SpringtideError for ``k`` below 1. A tree of fewer than ``k`` tokens has as many parts as tokens.
    """
    _check_parts(k)
    heads = {tree.root}
    while len(heads) < min(k, len(tree.order)):
        labels, below = _components(tree, heads)
        whole = labels.bincount()[labels]
        cost = (tree.weights * (1 / below + 1 / (whole - below))).tolist()
        heads.add(min((token for token in tree.order if token not in heads), key=cost.__getitem__))
    return _components(tree, heads)[0]


def _components(tree: Tree, heads: set[int]) -> tuple[Tensor, Tensor]:
    """The part of each token, and its subtree's size in the part, when ``heads`` lose their parents."""
    labels, sizes = torch.empty_like(tree.parents), torch.ones_like(tree.parents)
    for label, token in enumerate(sorted(heads, key=lambda head: int(tree.rank[head]))):
        labels[token] = label
    for token in tree.order:
        if token not in heads:
            labels[token] = labels[tree.parents[token]]
    for token in reversed(tree.order):
        if token not in heads:
            sizes[tree.parents[token]] += sizes[token]
    return labels, sizes


def _check_parts(k: int) -> None:
    if k < 1:
        raise SpringtideError(f"A foreground cannot be cut into {k} parts; give 1 or more.")


def subtrees(output: Output, inside: Tensor, k: int) -> Tensor:
    """Labels ``[B, N]``, int64, on the CPU, of the ``k`` parts of what is ``inside [B, N]`` (bool): from 1, 0 outside.

    They are subtrees of the tree of the tokens inside, see :func:`cut`. It is decoded from them alone, so that it is
    one. Where they are all tokens from some rank up, it is the upper end of the image's tree.
    There are fewer parts where fewer tokens are inside. Raises SpringtideError for ``k`` below 1.
    """
    _check_parts(k)
    masks, sent, through = (ask(output, inside.shape[1]) for ask in (dependency, messages, layers))
    labels = torch.zeros(inside.shape, dtype=torch.int64)
    for number, row in enumerate(inside):
        own = row.nonzero().squeeze(1).to(sent.device)
        if len(own):
            tree = decode(masks[number][own][:, own], sent[number, own], through[number, own])
            labels[number, own.cpu()] = 1 + cut(tree, k)
    return labels


def partitions(output: Output, found: Sequence[Saliency], k: int) -> list[Parts]:
    """The ``k`` parts of the foreground that was ``found`` in each image; see :func:`subtrees`."""
    labels = subtrees(output, torch.stack([one.foreground for one in found]), k)
    hidden, left = output.last_hidden_state.float().cpu(), output.indices.cpu()
    return [
        Parts(own, _part_features(features, own[kept], int(own.max())), one.grid)
        for one, own, features, kept in zip(found, labels, hidden, left, strict=True)
    ]


def _part_features(hidden: Tensor, labels: Tensor, k: int) -> Tensor:
    """Means ``[K, C]`` over the tokens of each part, of ``hidden [n, C]`` with ``labels [n]``; see :class:`Parts`."""
    own = F.one_hot(labels, k + 1)[:, 1:].float().mT
    hidden = hidden - own.sum(0) @ hidden / own.sum().clamp(min=1)
    return own @ hidden / own.sum(1, keepdim=True).clamp(min=1)


def cluster(features: Tensor, k: int, seed: int = 0) -> Tensor:
    """k-means of ``features [P, C]``: labels ``[P]``, int64, from 0; fewer than ``k`` if fewer features differ.

    Lloyd's rounds after k-means++ beginnings, the best of several; the same seed gives the same labels.
    """
    if not len(features):
        return torch.zeros(0, dtype=torch.int64)
    features = features.float().cpu()
    generator = torch.Generator().manual_seed(seed)
    found = [_lloyd(features, _beginning(features, k, generator)) for _ in range(TRIES)]
    return min(found, key=lambda one: one[1])[0]


def _beginning(features: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """``k`` features, or all that differ if there are fewer: each is taken with the square of its distance."""
    chances = torch.ones(len(features))
    centres = features[:0]
    while len(centres) < k and chances.sum() > 0:
        chosen = torch.multinomial(chances, 1, generator=generator)
        centres = torch.cat([centres, features[chosen]])
        chances = _distances(features, centres).min(1).values
    return centres


def _lloyd(features: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Labels, and the sum of squared distances to the centres."""
    labels = torch.full((len(features),), -1)
    for _ in range(ROUNDS):
        nearest = _distances(features, centres).argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        own = F.one_hot(labels, len(centres)).float().mT
        count = own.sum(1, keepdim=True)
        centres = torch.where(count > 0, own @ features / count.clamp(min=1), centres)
    return labels, float(_distances(features, centres).min(1).values.sum())


def _distances(features: Tensor, centres: Tensor) -> Tensor:
    """Squared, ``[P, K]``; exactly 0 of equal ones."""
    return torch.cdist(features, centres, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def align(partitions: Sequence[Parts], k: int, seed: int = 0) -> list[Tensor]:
    """Labels ``[N]`` of each image, 1 to ``k`` and 0 for the background, that mean the same in all images.

    They are those of k-means of the parts' features, so parts of one image that are alike become one.
    """
    labels = 1 + cluster(torch.cat([parts.features for parts in partitions]), k, seed)
    counts = [len(parts.features) for parts in partitions]
    own = torch.split(labels, counts)
    return [F.pad(one, (1, 0))[parts.labels] for parts, one in zip(partitions, own, strict=True)]


# -- one image ------------------------------------------------------------------------------------------------------


def tree(model: DependencyViTPreTrainedModel, pixel_values: Tensor) -> Tree:
    """The dependency tree of an image, ``[1, 3, height, width]``."""
    output, grid = _look_at_one(model, pixel_values)
    return trees(output, grid.tokens)[0]


def saliency(model: DependencyViTPreTrainedModel, pixel_values: Tensor, by: By = "rollout") -> Saliency:
    """What stands out in an image, ``[1, 3, height, width]``, see :func:`saliencies`."""
    return saliencies(*_look_at_one(model, pixel_values), by)[0]


def parts(model: DependencyViTPreTrainedModel, pixel_values: Tensor, k: int, by: By = "rollout") -> Parts:
    """The ``k`` parts of what stands out in an image, ``[1, 3, height, width]``, see :func:`partitions`."""
    output, grid = _look_at_one(model, pixel_values)
    return partitions(output, saliencies(output, grid, by), k)[0]


def _look_at_one(model: DependencyViTPreTrainedModel, pixel_values: Tensor) -> tuple[Output, Grid]:
    if len(pixel_values) != 1:
        raise SpringtideError(
            f"This takes one image, but pixel_values holds {len(pixel_values)}; give them one by one."
        )
    return look(model, pixel_values), Grid.of(pixel_values, model.config.patch_size)
