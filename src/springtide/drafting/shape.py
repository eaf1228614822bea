"""The shape of a draft tree, grown from how often each guess is right (arXiv 2401.10774, section 2.3.3).

``accuracy[k][i]`` is the share of positions where the ``i``-th best guess of step ``k`` is the target's own token, both
counted from 0. Taken as independent, they make a node's tokens up to it all right with the product of its path's
accuracies, and a pass commits the sum of these products over the tree's nodes. The node with the largest product is
always the best one to add, because no node has a larger product than its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import islice

from springtide.drafting.tree import TokenTree
from springtide.rows.segment import PREFIX

Accuracy = Sequence[Sequence[float]]

MOST_NODES = 128  # in a tree that is chosen by its cost

TYPICAL: Accuracy = (
    (0.56, 0.11, 0.05, 0.035, 0.025),
    (0.32, 0.11, 0.06, 0.04, 0.03),
    (0.20, 0.09, 0.06, 0.04, 0.03),
    (0.15, 0.08, 0.05, 0.035, 0.025),
    (0.12, 0.075, 0.05, 0.03, 0.025),
)
"""Five Medusa-1 heads of a 7B model: the sums over one and over five guesses are the published ones."""


@dataclass(frozen=True)
class Shape:
    """A tree without tokens: node 0 is the root, and node ``i > 0`` follows node ``parents[i]``.

    It takes the ``ranks[i]``-th best guess (from 0) of the step that is its depth. Parents come first.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node, 0 for the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == PREFIX else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Steps that the tree needs guesses of."""
        return max(self.depths)

    @property
    def width(self) -> int:
        """Guesses that the tree needs of a step."""
        return max(self.ranks) + 1

    def fill(self, token: int, guesses: Sequence[Sequence[int]]) -> TokenTree:
        """The tree with ``token`` at its root and ``guesses[step][rank]`` (the best first) below it."""
        nodes = zip(self.depths[1:], self.ranks[1:], strict=True)
        return TokenTree([token, *(guesses[depth - 1][rank] for depth, rank in nodes)], list(self.parents))


def typical(steps: int) -> Accuracy:
    """What to expect of a drafter of ``steps`` steps that was not measured."""
    return [TYPICAL[min(step, len(TYPICAL) - 1)] for step in range(steps)]


def grow(accuracy: Accuracy, size: int) -> Shape:
    """The tree of ``size`` nodes, its root among them, that commits the most; fewer if no others are ever right."""
    nodes = list(islice(_by_product(accuracy), size))
    return Shape(tuple(parent for parent, _, _ in nodes), tuple(rank for _, rank, _ in nodes))


def expected(accuracy: Accuracy, shape: Shape) -> float:
    """Tokens that a pass over the tree commits on average, the one after the accepted path counted."""
    products: list[float] = []
    for parent, rank, depth in zip(shape.parents, shape.ranks, shape.depths, strict=True):
        products.append(1.0 if parent == PREFIX else products[parent] * accuracy[depth - 1][rank])
    return sum(products)


def best(accuracy: Accuracy, cost: Callable[[int], float]) -> Shape:
    """The tree that commits the most for its cost; ``cost(n)`` is the time of a pass over a tree of ``n`` nodes."""
    gained, size, best_rate = 0.0, 1, 0.0
    for nodes, (_, _, product) in enumerate(islice(_by_product(accuracy), MOST_NODES), start=1):
        gained += product
        if gained / cost(nodes) > best_rate:
            size, best_rate = nodes, gained / cost(nodes)
    return grow(accuracy, size)


def _by_product(accuracy: Accuracy) -> Iterator[tuple[int, int, float]]:
    """``(parent, rank, product)`` of the nodes of the tree of all guesses, those of the largest products first."""
    heap = [(-1.0, PREFIX, 0, 0)]  # of equal products the one with the earlier parent, then the lower rank
    number = 0
    while heap:
        product, parent, rank, depth = heappop(heap)
        yield parent, rank, -product
        if depth < len(accuracy):
            for guess, share in enumerate(accuracy[depth]):
                if share > 0:
                    heappush(heap, (product * share, number, guess, depth + 1))
        number += 1
