"""Several drafters as one, whose ways are those of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from springtide.drafting.drafter import Drafter, Target, View
from springtide.drafting.tree import TokenTree
from springtide.errors import SpringtideError
from springtide.rows.segment import Segment


class States(list[Any]):
    """What each of the drafters remembers of a request."""

    def __copy__(self) -> States:
        return States(map(copy, self))

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(getattr(state, "nbytes", 0) for state in self)


@dataclass(frozen=True)
class Several(Drafter):
    """Drafters of which one at a time is asked: the one whose way is wanted. All of them learn what is committed.

    Raises SpringtideError if there are none, or two of a kind.
    """

    name: ClassVar[str] = "several"

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        names = [drafter.name for drafter in self.drafters]
        if not names:
            raise SpringtideError("There are no drafters to choose from; give at least one.")
        for name in names:
            if names.count(name) > 1:
                raise SpringtideError(f"Two of the drafters are '{name}'; give one of each kind.")

    @property
    def ways(self) -> Sequence[str]:
        return [name for drafter in self.drafters for name in drafter.ways]

    def using(self, way: int) -> Drafter:
        number, own = self._place(way)
        return self.drafters[number].using(own)

    def _place(self, way: int) -> tuple[int, int]:
        """Which of the drafters has that way, and which of its own it is."""
        return [(number, own) for number, drafter in enumerate(self.drafters) for own in range(len(drafter.ways))][way]

    @property
    def gain(self) -> float | None:
        return max((drafter.gain for drafter in self.drafters if drafter.gain is not None), default=None)

    def resolve(self, target: Target) -> Self:
        return replace(self, drafters=tuple(drafter.resolve(target) for drafter in self.drafters))

    def tuned(self, cost: Callable[[int], float]) -> Self:
        return replace(self, drafters=tuple(drafter.tuned(cost) for drafter in self.drafters))

    @property
    def most_rows(self) -> int:
        return max(drafter.most_rows for drafter in self.drafters)

    @property
    def branch_rows(self) -> int:
        return max(drafter.branch_rows for drafter in self.drafters)

    def branch(self, state: States, tokens: Sequence[int]) -> States:
        parts = zip(self.drafters, state, strict=True)
        return States(drafter.branch(own, tokens) for drafter, own in parts)

    def memory(self, tokens: int) -> int:
        return sum(drafter.memory(tokens) for drafter in self.drafters)

    def new_state(self) -> States:
        return States(drafter.new_state() for drafter in self.drafters)

    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        number, own = self._place(views[0].way)
        return self.drafters[number].propose([replace(view, way=own, draft=view.draft[number]) for view in views])

    def commit(self, segment: Segment, hidden: Tensor, kept: Sequence[int]) -> None:
        for drafter, state in zip(self.drafters, segment.draft, strict=True):
            own = copy(segment)
            own.draft = state
            drafter.commit(own, hidden, kept)
