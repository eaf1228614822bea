"""The dynamic programme for TidalDecode's layers against trying every layout."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.attention.layout import Layout, best_layouts, layout_of, neighbours

ROLES = ("full", "select", "sparse")


@st.composite
def problems(draw):
    """``kept`` (random, so that no two layouts lose the same) and the numbers of its layers."""
    count = draw(st.integers(2, 7))
    random = draw(st.randoms(use_true_random=False))
    kept = [[random.random() for _ in range(count)] for _ in range(count)]
    return kept, sorted(random.sample(range(40), count))


def lost_by(kept, roles):
    """What a layout loses, from its definition; None if it is none."""
    lost, last, unread = 0.0, None, None
    for j, role in enumerate(roles):
        if role == "select":
            if unread is not None:
                return None
            last = unread = j
        elif role == "sparse":
            if last is None:
                return None
            lost, unread = lost + 1 - kept[last][j], None
    return None if last is None or unread is not None else lost


def every_layout(kept, layers):
    """All that make sense: ``{roles: lost}``."""
    found = {roles: lost_by(kept, roles) for roles in product(ROLES, repeat=len(layers))}
    return {roles: lost for roles, lost in found.items() if lost is not None}


def roles_of(layout, layers):
    return tuple("full" if x in layout.full else "select" if x in layout.select else "sparse" for x in layers)


@settings(deadline=None, max_examples=15)
@given(problems())
def test_layout_of_knows_which_make_sense_and_what_they_lose(problem):
    kept, layers = problem
    valid = every_layout(kept, layers)
    for roles in product(ROLES, repeat=len(layers)):
        layout = layout_of(kept, layers, roles)
        if roles not in valid:
            assert layout is None
        else:
            assert layout.lost == pytest.approx(valid[roles]) and roles_of(layout, layers) == roles


@settings(deadline=None, max_examples=25)
@given(problems(), st.integers(1, 6), st.integers(1, 12))
def test_best_layouts_are_the_best_of_all(problem, dense, count):
    kept, layers = problem
    possible = {
        roles: lost for roles, lost in every_layout(kept, layers).items() if len(roles) - roles.count("sparse") == dense
    }
    expected = sorted(possible, key=lambda roles: possible[roles])[:count]
    got = best_layouts(kept, layers, dense, count)
    assert [roles_of(layout, layers) for layout in got] == expected
    assert [layout.lost for layout in got] == pytest.approx([possible[roles] for roles in expected])


@settings(deadline=None, max_examples=15)
@given(problems(), st.data())
def test_neighbours_are_all_layouts_one_move_away(problem, data):
    """One dense layer gets the other role, or another place (and either role there)."""
    kept, layers = problem
    valid = every_layout(kept, layers)
    own = data.draw(st.sampled_from(sorted(valid)))

    def one_move(other):
        changed = [(a, b) for a, b in zip(own, other, strict=True) if a != b]
        if len(changed) == 1:
            return "sparse" not in changed[0]
        gone, come = (sum(pair[side] == "sparse" for pair in changed) for side in (1, 0))
        return len(changed) == 2 and gone == come == 1

    found = neighbours(layout_of(kept, layers, own), kept, layers)
    assert {roles_of(layout, layers) for layout in found} == {roles for roles in valid if one_move(roles)}
    assert found == sorted(found)
    assert all(layout.lost == pytest.approx(valid[roles_of(layout, layers)]) for layout in found)


def test_options_are_those_of_the_policy():
    assert Layout(0.0, (0, 3), (1, 5, 9)).options == {"full": (0, 3), "select": 1, "reselect": (5, 9)}


def test_too_few_layers_give_no_layout():
    kept = [[1.0, 1.0], [1.0, 1.0]]
    assert best_layouts(kept, [0, 1], dense=2, count=3) == []
    assert best_layouts(kept, [0, 1], dense=1, count=3) == [Layout(0.0, (), (0,))]
