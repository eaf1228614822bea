"""The search for TidalDecode's layers against trying every layout."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.attention.layout import Layout, Prediction, best_layouts, extended, layout_of, neighbours, rated, search

ROLES = ("full", "select", "sparse")


@st.composite
def problems(draw, fewest=2, most=7):
    """``effects`` (random, so that no two layouts lose the same), ``joint``, and the numbers of the layers."""
    count = draw(st.integers(fewest, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    effects = torch.randn(draw(st.integers(1, 6)), count, count, generator=generator, dtype=torch.float64)
    layers = sorted(torch.randperm(40, generator=generator)[:count].tolist())
    return Prediction(effects, draw(st.sampled_from([0.0, 0.5, 1.0]))), layers


def lost_by(prediction, roles):
    """What a layout loses, from its definition; None if it is none."""
    last, unread, read = None, None, []
    for j, role in enumerate(roles):
        if role == "select":
            if unread is not None:
                return None
            last = unread = j
        elif role == "sparse":
            if last is None:
                return None
            unread = None
            read.append(prediction.effects[:, last, j])
    if last is None or unread is not None:
        return None
    alone, together = sum(x @ x for x in read), sum(read) @ sum(read)
    return float(prediction.joint * together + (1 - prediction.joint) * alone)


def every_layout(prediction, layers):
    """All that make sense: ``{roles: lost}``."""
    found = {roles: lost_by(prediction, roles) for roles in product(ROLES, repeat=len(layers))}
    return {roles: lost for roles, lost in found.items() if lost is not None}


def roles_of(layout, layers):
    return tuple("full" if x in layout.full else "select" if x in layout.select else "sparse" for x in layers)


def dense_in(roles):
    return len(roles) - roles.count("sparse")


@settings(deadline=None, max_examples=15)
@given(problems())
def test_layout_of_knows_which_make_sense_and_what_they_lose(problem):
    prediction, layers = problem
    valid = every_layout(prediction, layers)
    for roles in product(ROLES, repeat=len(layers)):
        layout = layout_of(prediction, layers, roles)
        if roles not in valid:
            assert layout is None
        else:
            assert layout.loss == pytest.approx(valid[roles]) and roles_of(layout, layers) == roles


@settings(deadline=None, max_examples=25)
@given(problems(), st.integers(1, 6), st.integers(1, 12))
def test_best_layouts_are_the_best_of_all_where_losses_add_up(problem, dense, count):
    prediction, layers = problem
    prediction = Prediction(prediction.effects, joint=0)
    possible = {roles: lost for roles, lost in every_layout(prediction, layers).items() if dense_in(roles) == dense}
    expected = sorted(possible, key=lambda roles: possible[roles])[:count]
    got = best_layouts(prediction.alone.tolist(), layers, dense, count)
    assert [roles_of(layout, layers) for layout in got] == expected
    assert [layout.loss for layout in got] == pytest.approx([possible[roles] for roles in expected])


@settings(deadline=None, max_examples=15)
@given(problems(), st.data())
def test_neighbours_are_all_layouts_one_move_away(problem, data):
    """One dense layer gets the other role, or another place (and either role there)."""
    prediction, layers = problem
    valid = every_layout(prediction, layers)
    own = data.draw(st.sampled_from(sorted(valid)))

    def one_move(other):
        changed = [(a, b) for a, b in zip(own, other, strict=True) if a != b]
        if len(changed) == 1:
            return "sparse" not in changed[0]
        gone, come = (sum(pair[side] == "sparse" for pair in changed) for side in (1, 0))
        return len(changed) == 2 and gone == come == 1

    found = neighbours(layout_of(prediction, layers, own), prediction, layers)
    assert {roles_of(layout, layers) for layout in found} == {roles for roles in valid if one_move(roles)}
    assert found == sorted(found)
    assert all(layout.loss == pytest.approx(valid[roles_of(layout, layers)]) for layout in found)


@settings(deadline=None, max_examples=40)
@given(problems(), st.integers(1, 4), st.data())
def test_search_ends_where_no_move_is_better(problem, count, data):
    """Nowhere worse than where it started; at the best of all where losses add up."""
    prediction, layers = problem
    dense = data.draw(st.integers(1, len(layers) - 1))
    valid = every_layout(prediction, layers)
    found = search(prediction, layers, dense, count)
    assert 1 <= len(found) <= count and found == sorted(found)
    for layout in found:
        roles = roles_of(layout, layers)
        assert dense_in(roles) == dense
        assert layout.loss == pytest.approx(valid[roles])
        assert all(other.loss >= layout.loss for other in neighbours(layout, prediction, layers))
    starts = [roles_of(x, layers) for x in best_layouts(prediction.alone.tolist(), layers, dense, count)]
    assert found[0].loss <= min(valid[roles] for roles in starts) + 1e-9
    if prediction.joint == 0:
        assert found[0].loss == pytest.approx(min(valid[roles] for roles in valid if dense_in(roles) == dense))


@settings(deadline=None, max_examples=25)
@given(problems(most=5))
def test_search_from_everywhere_finds_the_best_of_all(problem):
    prediction, layers = problem
    valid = every_layout(prediction, layers)
    for dense in range(1, len(layers)):
        found = search(prediction, layers, dense, len(valid))
        assert found[0].loss == pytest.approx(min(valid[roles] for roles in valid if dense_in(roles) == dense))


@settings(deadline=None, max_examples=10)
@given(problems(fewest=5, most=5))
def test_a_layout_is_extended_by_the_best_layer_and_role_each_time(problem):
    """Where that leaves a selection without a reader, it cannot be."""
    prediction, layers = problem
    valid = every_layout(prediction, layers)
    for own in valid:
        layout, best = layout_of(prediction, layers, own), own
        assert extended(layout, prediction, layers, dense_in(own)) == layout
        for dense in range(dense_in(own) + 1, len(layers)):
            found = extended(layout, prediction, layers, dense)
            more = [roles for roles in valid if dense_in(roles) == dense and only_more(best, roles)]
            if not more:
                assert found is None
                break
            best = min(more, key=lambda roles: valid[roles])
            assert roles_of(found, layers) == best and found.loss == pytest.approx(valid[best])


def only_more(roles, others):
    return all(own in (other, "sparse") for own, other in zip(roles, others, strict=True))


def test_a_layout_that_cannot_be_extended():
    prediction = Prediction(torch.ones(1, 4, 4), 0.0)
    assert extended(Layout(0.0, (), (0, 2)), prediction, range(4), 3) is None
    assert extended(Layout(0.0, (1,), (0,)), prediction, range(4), 3) == Layout(1.0, (1, 2), (0,))


@settings(deadline=None, max_examples=15)
@given(problems(most=5), problems(most=5), st.data())
def test_a_layout_is_rated_by_another_prediction(problem, other, data):
    prediction, layers = problem
    other = Prediction(prediction.effects.flip(0) * 2, other[0].joint)
    own = data.draw(st.sampled_from(sorted(every_layout(prediction, layers))))
    layout = rated(layout_of(prediction, layers, own), other, layers)
    assert roles_of(layout, layers) == own and layout.loss == pytest.approx(lost_by(other, own))


def test_a_prediction_by_hand():
    """Two samples of three layers, of which the first selects: effects 1 and 3, and 2 and -2."""
    effects = torch.zeros(2, 3, 3)
    effects[0, 0, 1:] = torch.tensor([1.0, 3.0])
    effects[1, 0, 1:] = torch.tensor([2.0, -2.0])
    effects[:, 1, 2] = 5.0
    pairs = [(0, 1), (0, 2)]
    assert Prediction(effects, 0.0)(pairs) == 1 + 9 + 4 + 4
    assert Prediction(effects, 1.0)(pairs) == 16
    assert Prediction(effects, 0.25)(pairs) == 0.25 * 16 + 0.75 * 18
    assert Prediction(effects, 1.0)([(0, 1), (1, 2)]) == 36 + 49
    assert Prediction(effects, 0.5).alone.tolist() == [[0, 5, 13], [0, 0, 50], [0, 0, 0]]
    layout = layout_of(Prediction(effects, 1.0), [4, 7, 9], ["select", "sparse", "sparse"])
    assert layout == Layout(16.0, (), (4,))


def test_options_are_those_of_the_policy():
    assert Layout(0.0, (0, 3), (1, 5, 9)).options == {"full": (0, 3), "select": 1, "reselect": (5, 9)}


def test_too_few_layers_give_no_layout():
    alone = [[0.0, 0.0], [0.0, 0.0]]
    assert best_layouts(alone, [0, 1], dense=2, count=3) == []
    assert best_layouts(alone, [0, 1], dense=1, count=3) == [Layout(0.0, (), (0,))]
