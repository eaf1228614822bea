"""Which layers of TidalDecode stay dense and which of them select, chosen by dynamic programming.

Given ``kept[s, l]``, the share of layer ``l``'s attention mass that the tokens selected at layer ``s`` hold, a layout
with a fixed number of dense layers is worth the sum of what its sparse layers keep. The best layouts by that sum are
found exactly, layer by layer; which of them is best is for a measurement of the model's output to say.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NONE = -1  # no layer has selected yet


@dataclass(frozen=True, order=True)
class Layout:
    """``lost``: attention mass that the sparse layers lose, summed over them; the layers ``full`` and ``select``."""

    lost: float
    full: tuple[int, ...]
    select: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the tidal policy."""
        return {"full": self.full, "select": self.select[0], "reselect": self.select[1:]}


def layout_of(kept: Sequence[Sequence[float]], layers: Sequence[int], roles: Sequence[str]) -> Layout | None:
    """The layout in which ``layers[i]`` has role ``"full"``, ``"select"`` or ``"sparse"``; None if it makes no sense.

    A sparse layer needs a selection before it, and every selection needs a sparse layer that reads it.
    """
    lost, last, read = 0.0, NONE, True
    for j, role in enumerate(roles):
        if role == "select":
            if not read:
                return None
            last, read = j, False
        elif role == "sparse":
            if last == NONE:
                return None
            lost, read = lost + 1 - kept[last][j], True
    named = [tuple(layer for layer, r in zip(layers, roles, strict=True) if r == role) for role in ("full", "select")]
    return Layout(lost, named[0], named[1]) if read and last != NONE else None


def neighbours(layout: Layout, kept: Sequence[Sequence[float]], layers: Sequence[int]) -> list[Layout]:
    """Layouts that differ by one dense layer's role, or by its place."""
    roles = ["full" if x in layout.full else "select" if x in layout.select else "sparse" for x in layers]
    found = []
    for i, role in enumerate(roles):
        if role == "sparse":
            continue
        for j, other in enumerate(roles):
            if j != i and other != "sparse":
                continue
            for new in ("full", "select"):
                changed = list(roles)
                changed[i], changed[j] = ("sparse", new) if j != i else (new, new)
                found.append(layout_of(kept, layers, changed))
    return sorted({other for other in found if other is not None and other != layout})


def best_layouts(kept: Sequence[Sequence[float]], layers: Sequence[int], dense: int, count: int) -> list[Layout]:
    """The ``count`` layouts that lose least, best first, with exactly ``dense`` dense layers among ``layers``.

    ``kept[i][j]`` is for selection at ``layers[i]`` and reading at ``layers[j]``. Layers before the first selection are
    full; a later layer is sparse, full (the selection stands), or selects. A state is the number of dense layers used,
    the layer that selected last and whether a sparse layer has read its choice (a selection that none reads is a full
    layer, so it is not tried); each state keeps its ``count`` best beginnings.
    """
    states: dict[tuple[int, int, bool], list[Layout]] = {(0, NONE, True): [Layout(0.0, (), ())]}
    for j, layer in enumerate(layers):
        following: dict[tuple[int, int, bool], list[Layout]] = {}
        for (used, last, read), layouts in states.items():
            for layout in layouts:
                if last != NONE:
                    lost = layout.lost + 1 - kept[last][j]
                    following.setdefault((used, last, True), []).append(Layout(lost, layout.full, layout.select))
                if used < dense:
                    full = Layout(layout.lost, (*layout.full, layer), layout.select)
                    following.setdefault((used + 1, last, read), []).append(full)
                if used < dense and read:
                    select = Layout(layout.lost, layout.full, (*layout.select, layer))
                    following.setdefault((used + 1, j, False), []).append(select)
        states = {state: heapq.nsmallest(count, layouts) for state, layouts in following.items()}
    finished = [
        x for (used, last, read), found in states.items() if used == dense and last != NONE and read for x in found
    ]
    return heapq.nsmallest(count, finished)
