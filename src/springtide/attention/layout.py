"""Which layers of TidalDecode stay dense and which of them select: the layouts that are predicted to change least.

What a layout changes is predicted from *effects* (:mod:`springtide.evaluation.effects`): a column for each pair of a
selecting and a reading layer. If what sparse layers do wrong is unrelated, their squares add up, and dynamic
programming over layers finds the best layouts exactly; if it is not, the columns add up before they are squared, and
the best layouts are looked for step by step from there. Which of them is best is for a measurement of the model's
output to say.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

NONE = -1  # no layer has selected yet
ROLES = ("full", "select")  # of dense layers; the others are sparse

Loss = Callable[[Sequence[tuple[int, int]]], float]
"""What the pairs (selecting, reading), as places in the list of layers, are predicted to lose together."""


@dataclass(frozen=True, order=True)
class Layout:
    """``loss``: predicted divergence from dense predictions, nats a token; the layers ``full`` and ``select``."""

    loss: float
    full: tuple[int, ...]
    select: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the tidal policy."""
        return {"full": self.full, "select": self.select[0], "reselect": self.select[1:]}


@dataclass(frozen=True)
class Prediction:
    """The loss of pairs from ``effects [N, selecting, reading]``: the share ``joint`` of it of their sum, squared.

    The rest is the sum of their squares.
    """

    effects: Tensor
    joint: float

    @cached_property
    def alone(self) -> Tensor:
        """What each pair loses by itself, ``[selecting, reading]``."""
        return self.effects.square().sum(0)

    def __call__(self, pairs: Sequence[tuple[int, int]]) -> float:
        selecting, reading = (list(places) for places in zip(*pairs, strict=True))
        together = self.effects[:, selecting, reading].sum(1).square().sum()
        return float(self.joint * together + (1 - self.joint) * self.alone[selecting, reading].sum())


def layout_of(loss: Loss, layers: Sequence[int], roles: Sequence[str]) -> Layout | None:
    """The layout in which ``layers[i]`` has role ``"full"``, ``"select"`` or ``"sparse"``; None if it makes no sense.

    A sparse layer needs a selection before it, and every selection needs a sparse layer that reads it.
    """
    last, read, pairs = NONE, True, []
    for j, role in enumerate(roles):
        if role == "select":
            if not read:
                return None
            last, read = j, False
        elif role == "sparse":
            if last == NONE:
                return None
            pairs.append((last, j))
            read = True
    if not read or not pairs:
        return None
    full, select = (tuple(layer for layer, r in zip(layers, roles, strict=True) if r == role) for role in ROLES)
    return Layout(loss(pairs), full, select)


def roles_of(layout: Layout, layers: Sequence[int]) -> list[str]:
    """The role of each of the layers."""
    return ["full" if x in layout.full else "select" if x in layout.select else "sparse" for x in layers]


def rated(layout: Layout, loss: Loss, layers: Sequence[int]) -> Layout:
    """The same layout with what it is predicted to lose by another measure."""
    found = layout_of(loss, layers, roles_of(layout, layers))
    assert found is not None, "the layout made sense"
    return found


def neighbours(layout: Layout, loss: Loss, layers: Sequence[int]) -> list[Layout]:
    """Layouts that differ by one dense layer's role, or by its place; best first."""
    roles = roles_of(layout, layers)
    found = []
    for i, role in enumerate(roles):
        if role == "sparse":
            continue
        for j, other in enumerate(roles):
            if j != i and other != "sparse":
                continue
            for new in ROLES:
                changed = list(roles)
                changed[i], changed[j] = ("sparse", new) if j != i else (new, new)
                found.append(layout_of(loss, layers, changed))
    return sorted({other for other in found if other is not None and other != layout})


def extended(layout: Layout, loss: Loss, layers: Sequence[int], dense: int) -> Layout | None:
    """The layout with more dense layers, ``dense`` in all, each the one with which it loses least then.

    None where a selection would be left that no layer reads.
    """
    roles = roles_of(layout, layers)
    while len(roles) - roles.count("sparse") < dense:
        sparse = [i for i, role in enumerate(roles) if role == "sparse"]
        more = [[*roles[:i], new, *roles[i + 1 :]] for i in sparse for new in ROLES]
        found = {other: roles for roles in more if (other := layout_of(loss, layers, roles))}
        if not found:
            return None
        layout = min(found)
        roles = found[layout]
    return layout


def search(loss: Prediction, layers: Sequence[int], dense: int, count: int) -> list[Layout]:
    """Layouts with ``dense`` dense layers that lose little, best first, ``count`` at most.

    From each of the ``count`` layouts whose pairs lose least by themselves, to the best neighbour while there is a
    better one.
    """
    found = set()
    for start in best_layouts(loss.alone.tolist(), layers, dense, count):
        best = rated(start, loss, layers)
        while (better := neighbours(best, loss, layers)) and better[0].loss < best.loss:
            best = better[0]
        found.add(best)
    return sorted(found)


def best_layouts(alone: Sequence[Sequence[float]], layers: Sequence[int], dense: int, count: int) -> list[Layout]:
    """The ``count`` layouts whose pairs' losses have the smallest sum, with ``dense`` dense ones of ``layers``.

    ``alone[i][j]`` is for selection at ``layers[i]`` and reading at ``layers[j]``. Layers before the first selection
    are full; a later layer is sparse, full (the selection stands), or selects. A state is the number of dense layers
    used, the layer that selected last and whether a sparse layer has read its choice (a selection that none reads is a
    full layer, so it is not tried); each state keeps its ``count`` best beginnings.
    """
    states: dict[tuple[int, int, bool], list[Layout]] = {(0, NONE, True): [Layout(0.0, (), ())]}
    for j, layer in enumerate(layers):
        following: dict[tuple[int, int, bool], list[Layout]] = {}
        for (used, last, read), layouts in states.items():
            for layout in layouts:
                if last != NONE:
                    sparse = Layout(layout.loss + alone[last][j], layout.full, layout.select)
                    following.setdefault((used, last, True), []).append(sparse)
                if used < dense:
                    full = Layout(layout.loss, (*layout.full, layer), layout.select)
                    following.setdefault((used + 1, last, read), []).append(full)
                if used < dense and read:
                    select = Layout(layout.loss, layout.full, (*layout.select, layer))
                    following.setdefault((used + 1, j, False), []).append(select)
        states = {state: heapq.nsmallest(count, layouts) for state, layouts in following.items()}
    finished = [
        x for (used, last, read), found in states.items() if used == dense and last != NONE and read for x in found
    ]
    return heapq.nsmallest(count, finished)
