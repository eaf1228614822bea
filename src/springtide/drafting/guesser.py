"""What drafters with weights share: ranked guesses of each step, and how often they are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from springtide.drafting.drafter import Drafter, Target
from springtide.drafting.shape import Accuracy, Shape, best, expected, grow, typical

NODES = 16  # of a tree whose shape nobody chose


@dataclass(frozen=True, eq=False, kw_only=True)
class Guesser(Drafter):
    """A drafter that guesses some steps ahead, several tokens for each.

    Attributes:
        accuracy: how often each guess is right, see :mod:`springtide.drafting.shape`; None if it was not measured.
        target: the model, once it is resolved.
        gain: how many times as fast as plain decoding it is predicted to be, once it is tuned.
    """

    accuracy: Accuracy | None = None
    target: Target | None = None
    gain: float | None = None

    @property
    def steps(self) -> int:
        """How many tokens ahead it guesses."""
        raise NotImplementedError

    def tuned(self, cost: Callable[[int], float]) -> Self:
        """The drafter with trees that pay most: ``cost(n)`` is the time of a pass of n rows, in milliseconds."""
        raise NotImplementedError

    @property
    def _accuracy(self) -> Accuracy:
        return self.accuracy or typical(self.steps)


@dataclass(frozen=True, eq=False, kw_only=True)
class Shaped(Guesser):
    """A guesser whose trees have all one shape, by how often guesses are right on average.

    Attributes:
        shape: of the trees that are proposed; by default 16 nodes, those that the accuracy favours.

    For the others see :class:`Guesser`.
    """

    shape: Shape | None = None

    @property
    def most_rows(self) -> int:
        return len(self.shape.parents) if self.shape is not None else NODES

    def rows(self, nodes: int) -> int:
        """Rows that cost as much as a pass over a tree of ``nodes`` nodes."""
        return nodes

    def tuned(self, cost: Callable[[int], float]) -> Self:
        """See :meth:`Guesser.tuned`: the tree that commits the most for its cost."""
        shape = best(self._accuracy, lambda nodes: cost(self.rows(nodes)))
        rows = self.rows(len(shape.parents)) if shape.depth else 1
        return replace(self, shape=shape, gain=expected(self._accuracy, shape) * cost(1) / cost(rows))

    @property
    def favoured(self) -> Shape:
        """Its shape, or the default one."""
        return self.shape or grow(self._accuracy, NODES)
