"""What of TidalDecode is dense and which layers select: the layouts that are predicted to change least.

What a layout changes is predicted from *effects* (:mod:`springtide.evaluation.effects`): a column for each selecting
layer and each KV head that reads its choice. If what heads do wrong is unrelated, the columns' squares add up; if it is
not, the columns add up before they are squared. Given the layers that select, KV heads are made dense one by one, each
the one that then leaves the least loss; the layers that select are looked for step by step. Which layout is best is
for a measurement of the model's output to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from springtide.options import KVHead

BATCH = 64  # choices of selecting layers that are looked at side by side


@dataclass(frozen=True)
class Layout:
    """What is dense: the layers ``full``, the layers ``select``, which also choose tokens, and single KV heads.

    ``loss`` is the predicted divergence from dense predictions, nats a token. Layouts are equal that are dense alike.
    """

    full: tuple[int, ...]
    select: tuple[int, ...]
    full_heads: tuple[KVHead, ...] = ()
    loss: float = field(default=0.0, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the tidal policy."""
        first, *others = self.select
        return {"full": self.full, "full_heads": self.full_heads, "select": first, "reselect": tuple(others)}

    def as_json(self) -> dict[str, Any]:
        """As ``springtide.json`` has it."""
        heads = [list(head) for head in self.full_heads]
        return {"full": list(self.full), "select": list(self.select), "full_heads": heads}


@dataclass(frozen=True)
class Prediction:
    """Predicts losses from ``effects [N, selecting, reading, KV head]`` of pairs of ``layers``.

    A loss is the share ``joint`` of its columns' sum, squared, and the rest of the sum of their squares.
    """

    effects: Tensor
    layers: Sequence[int]
    joint: float

    def layouts(self, choices: Iterable[tuple[int, ...]], dense: int) -> list[Layout]:
        """For each choice of layers that select, the layout with as many dense KV heads as ``dense`` layers have.

        Layers before the first that selects are full. Choices for which that is too few heads are left out, and those
        that leave none sparse. The best come first.
        """
        places = {layer: place for place, layer in enumerate(self.layers)}
        chosen = [sorted(places[layer] for layer in choice) for choice in choices]
        batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
        found = dict.fromkeys(layout for batch in batches for layout in self._filled(batch, dense))
        return sorted(found, key=lambda layout: layout.loss)

    def _filled(self, choices: Sequence[Sequence[int]], dense: int) -> list[Layout]:
        """The same for a few choices of places in the list of layers."""
        count, kv_heads = self.effects.shape[2:]
        sources = torch.tensor([[_before(place, choice) for place in range(count)] for choice in choices])
        sparse = (sources >= 0)[:, :, None].expand(-1, -1, kv_heads).flatten(1)  # [choices, all KV heads]
        columns = self.effects[:, sources, torch.arange(count)].flatten(2).permute(1, 2, 0) * sparse[:, :, None]
        products = columns @ columns.transpose(1, 2)
        alone, with_sum = products.diagonal(dim1=1, dim2=2), products.sum(2)
        together, apart = with_sum.sum(1), alone.sum(1)
        left = dense * kv_heads - (~sparse).sum(1)
        rows = torch.arange(len(choices))
        for step in range(max(0, int(left.max()))):
            gain = self.joint * (2 * with_sum - alone) + (1 - self.joint) * alone
            gain, head = gain.masked_fill(~sparse, -torch.inf).max(1)
            taken = (step < left) & gain.isfinite()
            sparse[rows[taken], head[taken]] = False
            together = together - taken * (2 * with_sum[rows, head] - alone[rows, head])
            apart = apart - taken * alone[rows, head]
            with_sum = with_sum - taken[:, None] * products[rows, head]
        losses = (self.joint * together + (1 - self.joint) * apart).clamp(min=0).tolist()
        return [
            self._layout(loss, source, heads.view(count, kv_heads).tolist())
            for loss, source, heads, rest in zip(losses, sources.tolist(), sparse, left, strict=True)
            if rest >= 0 and heads.any()
        ]

    def _layout(self, loss: float, sources: list[int], sparse: list[list[bool]]) -> Layout:
        """A layer whose heads are all dense is full, unless it selects what is read."""
        select = {source for source, heads in zip(sources, sparse, strict=True) if any(heads)}
        full = [place for place, heads in enumerate(sparse) if not any(heads) and place not in select]
        single = [
            KVHead(self.layers[place], head)
            for place, heads in enumerate(sparse)
            for head, reads in enumerate(heads)
            if any(heads) and not reads
        ]
        full_layers, selecting = (tuple(self.layers[place] for place in places) for places in (full, sorted(select)))
        return Layout(full_layers, selecting, tuple(single), loss)

    def exchanges(self, layout: Layout) -> list[Layout]:
        """Layouts with the same selecting layers in which one dense KV head and a sparse one change roles; best first.

        Where heads are summed up to layers, these are layers; a layout with single heads has no such exchanges.
        """
        count, kv_heads = self.effects.shape[2:]
        places = {layer: place for place, layer in enumerate(self.layers)}
        if kv_heads == 1 and layout.full_heads:
            return []
        sources = [_before(place, [places[layer] for layer in layout.select]) for place in range(count)]
        free = torch.tensor([source >= 0 for source in sources])[:, None].expand(-1, kv_heads).clone()
        sparse = free.clone()
        sparse[[places[layer] for layer in layout.full]] = False
        for layer, head in layout.full_heads:
            sparse[places[layer], head] = False
        columns = self.effects[:, sources, torch.arange(count)].flatten(1).T  # [all KV heads, N]
        dense, reads = (free & ~sparse).flatten().nonzero()[:, 0], sparse.flatten().nonzero()[:, 0]
        if not len(dense) or not len(reads):
            return []
        alone, total = columns.square().sum(1), columns[reads].sum(0)
        changed = total + columns[dense][:, None] - columns[reads]  # [dense, sparse, N]
        together = changed.square().sum(2)
        apart = alone[reads].sum() + alone[dense][:, None] - alone[reads]
        losses = (self.joint * together + (1 - self.joint) * apart).flatten()
        found = []
        for i in losses.argsort()[:BATCH].tolist():
            now = sparse.flatten().clone()
            now[dense[i // len(reads)]], now[reads[i % len(reads)]] = True, False
            found.append(self._layout(float(losses[i]), sources, now.view(count, kv_heads).tolist()))
        return found


def _before(place: int, selecting: Sequence[int]) -> int:
    """The last selecting place before a place whose layer reads it; -1 for one that selects or comes before all."""
    return max((other for other in selecting if other < place), default=-1) if place not in selecting else -1


def neighbours(layout: Layout, prediction: Prediction, dense: int) -> list[Layout]:
    """Layouts in which one layer more selects, one less, or another one instead; best first."""
    own = set(layout.select)
    less = [own - {layer} for layer in own]
    more = [start | {layer} for start in (own, *less) for layer in prediction.layers if layer not in own]
    found = prediction.layouts(sorted({tuple(sorted(choice)) for choice in less + more if choice}), dense)
    return [other for other in found if other != layout]


def search(prediction: Prediction, dense: int, starts: int) -> Layout:
    """The layout with as many dense KV heads as ``dense`` layers have, not all, that is predicted to lose least.

    From each of the best ``starts`` of those in which one or two layers select, to the best neighbour while there is a
    better one.
    """
    choices = [choice for count in (1, 2) for choice in combinations(prediction.layers, count)]
    found = []
    for layout in prediction.layouts(choices, dense)[:starts]:
        while (near := neighbours(layout, prediction, dense)) and near[0].loss < layout.loss:
            layout = near[0]
        found.append(layout)
    return min(found, key=lambda layout: layout.loss)
