"""What of TidalDecode is dense and which layers select: the layouts that are predicted to change least.

A layout is predicted to lose the sum of what each of its sparse KV heads loses under the choice of the last layer that
selected (:mod:`springtide.evaluation.effects`). So, given the layers that select, the KV heads that would lose most are
dense; the layers that select are looked for step by step. Predictions learn from layouts that were measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from springtide.options import KVHead

EXCHANGES = 40  # that are looked at
RIDGE = 0.05  # how much a correction costs, squared, beside squares of relative errors
LEAST = 0.25  # of a prediction is left when it is corrected
ROUNDING = 1e-6  # nats a token, which are as good as none


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
    """What each KV head of a layer loses by reading what another layer selected: ``losses`` add up to a layout's.

    ``losses [selecting, reading, KV head]``, fp64, nats a token, are those of pairs of ``layers``.
    """

    losses: Tensor
    layers: Sequence[int]

    def layouts(self, choices: Collection[tuple[int, ...]], dense: int, most: int | None = None) -> list[Layout]:
        """For each choice of layers that select, the layout with as many dense KV heads as ``dense`` layers have.

        Layers before the first that selects are full. Choices for which that is too few heads are left out, and those
        that leave none sparse. The best come first, of ``most`` choices.
        """
        sources = torch.stack([self._sources(choice) for choice in choices])
        losses, reads = self._read(sources)
        left = dense * self.losses.shape[2] - (~reads).flatten(1).sum(1)
        most_first = losses.masked_fill(~reads, -torch.inf).flatten(1).argsort(1, descending=True)
        sparse = reads & (most_first.argsort(1) >= left[:, None]).view_as(reads)
        lost = (losses * sparse).sum((1, 2)).masked_fill((left < 0) | ~sparse.flatten(1).any(1), torch.inf)
        best = [place for place in lost.argsort(stable=True)[:most].tolist() if lost[place] < torch.inf]
        found = dict.fromkeys(self._layout(sources[place], losses[place], sparse[place]) for place in best)
        return sorted(found, key=lambda layout: layout.loss)

    def exchanges(self, layout: Layout) -> list[Layout]:
        """Layouts in which one dense KV head and a sparse one change roles; best first."""
        sources, losses, reads, sparse = self._heads(layout)
        dense, reader = (reads & ~sparse).flatten().nonzero(), sparse.flatten().nonzero()[:, 0]
        changes = losses.flatten()[dense] - losses.flatten()[reader]
        found = []
        for place in changes.flatten().argsort()[:EXCHANGES].tolist():
            now = sparse.flatten().clone()
            now[dense[place // len(reader)]], now[reader[place % len(reader)]] = True, False
            found.append(self._layout(sources, losses, now.view_as(sparse)))
        return found

    def corrected(self, measured: Mapping[Layout, float]) -> Prediction:
        """Predictions that agree better with the losses that were ``measured``.

        What gradients of a dense pass miss is how much worse a layer selects, and a head bears it, where the layers
        before are sparse.
        """
        if not measured or not self.losses.any():
            return self
        values = {layout: max(value, ROUNDING) for layout, value in measured.items()}
        factors = self.factors(values, values)
        return Prediction(self.losses * factors.clamp(min=LEAST * float(factors.median())), self.layers)

    def factors(self, measured: Mapping[Layout, float], scale: Mapping[Layout, float]) -> Tensor:
        """What to multiply losses with for what was ``measured``, which is off by about ``scale``: as ``losses``.

        One factor for all, plus a correction for each layer that selects and for each KV head that reads, as small as
        the measurements allow (ridge regression).
        """
        predicted = torch.stack([self.lost(layout) for layout in measured])
        scales = torch.tensor([scale[layout] for layout in measured], dtype=predicted.dtype)
        values = torch.tensor([*measured.values()], dtype=predicted.dtype) / scales
        predicted /= scales[:, None, None, None]
        totals = predicted.sum((1, 2, 3))
        factor = (totals @ values) / (totals @ totals)
        parts = torch.cat([predicted.sum((2, 3)), predicted.sum(1).flatten(1)], 1)
        squares = parts.T @ parts + RIDGE * torch.eye(parts.shape[1], dtype=parts.dtype)
        selecting, reading = torch.linalg.solve(squares, parts.T @ (values - factor * totals)).split(
            [len(self.layers), parts.shape[1] - len(self.layers)]
        )
        factors: Tensor = factor + selecting[:, None, None] + reading.view(self.losses.shape[1:])
        return factors

    def lost(self, layout: Layout) -> Tensor:
        """The losses that add up to a layout's, in their places; the others are 0."""
        sources, losses, _, sparse = self._heads(layout)
        found = torch.zeros_like(self.losses)
        found[sources, torch.arange(len(sources))] = losses * sparse
        return found

    def _sources(self, select: Collection[int]) -> Tensor:
        """For the place of each layer the place of that whose choice it reads; -1 where that is none."""
        last, found = -1, []
        for place, layer in enumerate(self.layers):
            if layer in select:
                last = place
            found.append(-1 if layer in select else last)
        return torch.tensor(found)

    def _read(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        """What each KV head would lose, and whether it has a choice to read: ``[choices, reading, KV head]``."""
        losses = self.losses[sources, torch.arange(sources.shape[1])]
        return losses, (sources >= 0)[:, :, None].expand_as(losses)

    def _heads(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the layers of a layout read; and by KV head what it would lose, whether it could read, and does so."""
        sources = self._sources(layout.select)
        losses, reads = (x[0] for x in self._read(sources[None]))
        sparse = reads.clone()
        sparse[[self.layers.index(layer) for layer in layout.full]] = False
        for layer, head in layout.full_heads:
            sparse[self.layers.index(layer), head] = False
        return sources, losses, reads, sparse

    def _layout(self, sources: Tensor, losses: Tensor, sparse: Tensor) -> Layout:
        """A layer whose heads are all dense is full, unless it selects what is read."""
        heads = [[head for head, reads in enumerate(row) if not reads] for row in sparse.tolist()]
        whole = [len(dense) == sparse.shape[1] for dense in heads]
        select = {source for source, dense in zip(sources.tolist(), whole, strict=True) if not dense}
        full = [layer for place, layer in enumerate(self.layers) if whole[place] and place not in select]
        selecting = [layer for place, layer in enumerate(self.layers) if place in select]
        single = [
            KVHead(layer, head)
            for layer, dense, all_ in zip(self.layers, heads, whole, strict=True)
            if not all_
            for head in dense
        ]
        return Layout(tuple(full), tuple(selecting), tuple(single), float((losses * sparse).sum()))


def neighbours(layout: Layout, prediction: Prediction, dense: int, most: int | None = None) -> list[Layout]:
    """Layouts in which one layer more selects, one less, or another one instead; best first, of ``most`` choices."""
    own = set(layout.select)
    less = [own - {layer} for layer in own]
    more = [start | {layer} for start in (own, *less) for layer in prediction.layers if layer not in own]
    choices = {tuple(sorted(choice)) for choice in less + more if choice}
    return [other for other in prediction.layouts(sorted(choices), dense, most) if other != layout]


def search(prediction: Prediction, dense: int) -> Layout:
    """The layout with as many dense KV heads as ``dense`` layers have, not all, that is predicted to lose least.

    From the best of those in which one or two layers select, to the best neighbour while there is a better one.
    """
    choices = [choice for count in (1, 2) for choice in combinations(prediction.layers, count)]
    layout = prediction.layouts(choices, dense, 1)[0]
    while (near := neighbours(layout, prediction, dense, 1)) and near[0].loss < layout.loss:
        layout = near[0]
    return layout
