from __future__ import annotations

from itertools import combinations, product
from math import isclose, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.drafting.shape import MOST_NODES, TYPICAL, best, expected, grow, typical
from springtide.drafting.tree import TokenTree

shares = st.floats(0, 1)


@st.composite
def accuracies(draw, most_steps=4, most_guesses=4):
    """Accuracies whose steps' sums are at most 1, in any order."""
    table = []
    for _ in range(draw(st.integers(1, most_steps))):
        row = draw(st.lists(shares, min_size=1, max_size=most_guesses))
        table.append([share / max(1.0, sum(row)) for share in row])
    return table


def trail(shape, node):
    """Ranks from the root's child down to ``node``."""
    return () if shape.parents[node] == -1 else (*trail(shape, shape.parents[node]), shape.ranks[node])


@settings(deadline=None)
@given(accuracies(), st.integers(1, 20))
def test_a_grown_tree_is_a_tree_of_the_guesses(accuracy, size):
    shape = grow(accuracy, size)
    assert 1 <= len(shape.parents) == len(shape.ranks) <= size
    assert shape.parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(shape.parents) if node)
    assert shape.depth <= len(accuracy)
    trails = [trail(shape, node) for node in range(len(shape.parents))]
    assert len(set(trails)) == len(trails), "no guess twice below the same node"
    assert all(rank < len(accuracy[step]) for path in trails for step, rank in enumerate(path))
    assert shape.depths == tuple(len(path) for path in trails)
    assert shape.width == max([rank + 1 for path in trails for rank in path], default=1)


@settings(deadline=None, max_examples=40)
@given(accuracies(most_steps=3, most_guesses=2), st.integers(1, 6))
def test_no_tree_of_the_same_size_commits_more(accuracy, size):
    """Against all trees, which are the sets of guesses that hold the guesses before their own."""
    paths = [
        path
        for depth in range(1, len(accuracy) + 1)
        for path in product(*(range(len(row)) for row in accuracy[:depth]))
    ]
    most = max(
        1 + sum(prod(accuracy[step][rank] for step, rank in enumerate(path)) for path in chosen)
        for count in range(min(size, len(paths) + 1))
        for chosen in combinations(paths, count)
        if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
    )
    assert isclose(expected(accuracy, grow(accuracy, size)), most)


@settings(deadline=None, max_examples=40)
@given(accuracies(most_steps=3, most_guesses=3), st.integers(1, 12))
def test_expected_is_the_mean_of_what_is_committed(accuracy, size):
    """Over all that can be right: one guess of each step, or none."""
    shape = grow(accuracy, size)
    nodes = {trail(shape, node) for node in range(len(shape.parents))}
    mean = 0.0
    for right in product(*(range(len(row) + 1) for row in accuracy)):  # the last number: none of them
        chance = prod([*row, 1 - sum(row)][rank] for row, rank in zip(accuracy, right, strict=True))
        accepted = next((k for k in range(len(right)) if right[: k + 1] not in nodes), len(right))
        mean += chance * (1 + accepted)
    assert isclose(expected(accuracy, shape), mean, abs_tol=1e-9)


@settings(deadline=None, max_examples=40)
@given(accuracies(), st.lists(st.floats(0.01, 1), min_size=MOST_NODES, max_size=MOST_NODES))
def test_the_best_tree_commits_the_most_for_its_cost(accuracy, increments):
    costs = [1 + sum(increments[:nodes]) for nodes in range(MOST_NODES)]

    def rate(shape):
        return expected(accuracy, shape) / costs[len(shape.parents) - 1]

    chosen = best(accuracy, lambda nodes: costs[nodes - 1])
    assert rate(chosen) >= max(rate(grow(accuracy, size)) for size in range(1, MOST_NODES + 1)) * (1 - 1e-9)


def test_guesses_that_are_never_right_are_left_out():
    assert grow([[0.0, 0.0], [1.0, 0.0]], 9).parents == (-1,)
    assert grow([[0.0, 0.5], [1.0, 0.0]], 9) == grow([[0.0, 0.5], [1.0, 0.0]], 3)


def test_rows_that_cost_nothing_make_a_large_tree_and_dear_ones_none():
    assert len(best(TYPICAL, lambda rows: 1.0).parents) == MOST_NODES
    assert best(TYPICAL, lambda rows: float(rows)).parents == (-1,)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_drafter_that_was_not_measured_gets_typical_accuracies(steps):
    assert len(typical(steps)) == steps
    assert list(typical(steps))[:5] == list(TYPICAL)[:steps]


def test_typical_accuracies_have_the_published_sums():
    assert [round(row[0], 3) for row in TYPICAL] == [0.56, 0.32, 0.20, 0.15, 0.12]
    assert [round(sum(row), 3) for row in TYPICAL] == [0.78, 0.56, 0.42, 0.34, 0.30]


def test_a_shape_is_filled_with_the_guesses_of_each_depth():
    shape = grow([[0.5, 0.4], [0.5, 0.1]], 5)
    assert shape.parents == (-1, 0, 0, 1, 2) and shape.ranks == (0, 0, 1, 0, 0)
    assert shape.fill(7, [[11, 12], [21, 22]]) == TokenTree([7, 11, 12, 21, 21], [-1, 0, 0, 1, 2])
