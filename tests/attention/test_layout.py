"""The search for what of TidalDecode is dense, against computing every layout from the definition."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.attention import Tidal
from springtide.attention import layout as layouts
from springtide.attention.calibration import VERSION
from springtide.attention.layout import Layout, Prediction, neighbours, search
from springtide.options import KVHead
from springtide.rows.spec import ModelSpec

few = settings(deadline=None, max_examples=25)


@st.composite
def problems(draw, fewest=3, most=6):
    """A prediction of random losses, so that no two heads count alike; layers have gaps between their numbers."""
    count = draw(st.integers(fewest, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (count, count, draw(st.integers(1, 3)))
    layers = sorted(torch.randperm(40, generator=generator)[:count].tolist())
    return Prediction(torch.rand(shape, generator=generator, dtype=torch.float64), layers)


def loss_of(prediction, pairs):
    """Of what is sparse, ``[(selecting layer, reading layer, head)]``, from the definition."""
    place = prediction.layers.index
    return sum(float(prediction.losses[place(by), place(to), head]) for by, to, head in pairs)


def readers(prediction, select, dense=()):
    """``(selecting layer, reading layer, head)`` of all heads that are not dense, given the layers that select."""
    return [
        (max(by for by in select if by < to), to, head)
        for to in prediction.layers
        if to not in select and to > min(select)
        for head in range(prediction.losses.shape[2])
        if (to, head) not in dense
    ]


def left_sparse(prediction, layout):
    """The same of a layout."""
    heads = range(prediction.losses.shape[2])
    dense = {*layout.full_heads, *((layer, head) for layer in layout.full for head in heads)}
    return readers(prediction, layout.select, dense)


def to_fill(prediction, choice, dense):
    """How many heads are made dense beside those that must be; None if there are too few, or nothing is left."""
    kv_heads, pairs = prediction.losses.shape[2], readers(prediction, choice)
    must = len(prediction.layers) * kv_heads - len(pairs)
    left = dense * kv_heads - must
    return left if 0 <= left < len(pairs) else None


def normal(prediction, pairs):
    """The layout in which just ``pairs`` are sparse."""
    select, reading = ({pair[role] for pair in pairs} for role in (0, 1))
    heads = {(layer, head) for layer in reading for head in range(prediction.losses.shape[2])}
    single = sorted(heads - {pair[1:] for pair in pairs})
    full = [layer for layer in prediction.layers if layer not in select | reading]
    return Layout(tuple(full), tuple(sorted(select)), tuple(KVHead(*head) for head in single))


def least(prediction, choice, count):
    """What stays sparse of all readers, less the ``count`` that lose most."""
    return sorted(readers(prediction, choice), key=lambda pair: -loss_of(prediction, [pair]))[count:]


def every_choice(prediction, most=None):
    """Of layers that select: all, or those of up to so many."""
    counts = range(1, (most or len(prediction.layers)) + 1)
    return [choice for count in counts for choice in combinations(prediction.layers, count)]


@few
@given(problems(), st.data())
def test_a_layout_states_the_loss_of_the_definition(prediction, data):
    dense = data.draw(st.integers(1, len(prediction.layers) - 1))
    found = prediction.layouts(every_choice(prediction), dense)
    assert found
    for layout in found:
        assert layout.loss == pytest.approx(loss_of(prediction, left_sparse(prediction, layout)), abs=1e-10)


@few
@given(problems(), st.data())
def test_as_many_heads_are_dense_as_the_layers_have(prediction, data):
    dense, kv_heads = data.draw(st.integers(1, len(prediction.layers) - 1)), prediction.losses.shape[2]
    for layout in prediction.layouts(every_choice(prediction), dense):
        layers = [*layout.full, *layout.select]
        assert len({*layers}) == len(layers) and {*layers} <= {*prediction.layers}
        assert len(layers) * kv_heads + len({*layout.full_heads}) == dense * kv_heads
        assert {*range(min(layout.select))} & {*prediction.layers} <= {*layout.full}


@few
@given(problems(), st.data())
def test_full_heads_are_some_of_the_heads_of_layers_that_read(prediction, data):
    """A layer whose heads are all dense is full, and only layers that are read select."""
    dense, kv_heads = data.draw(st.integers(1, len(prediction.layers) - 1)), prediction.losses.shape[2]
    for layout in prediction.layouts(every_choice(prediction), dense):
        by_layer = [head.layer for head in layout.full_heads]
        assert not {*by_layer} & {*layout.full, *layout.select}
        assert all(by_layer.count(layer) < kv_heads for layer in by_layer)
        assert all(isinstance(head, KVHead) and 0 <= head.head < kv_heads for head in layout.full_heads)
        assert {by for by, _, _ in left_sparse(prediction, layout)} == {*layout.select} != set()
        for part in (layout.full, layout.select, layout.full_heads):
            assert list(part) == sorted({*part})


@settings(deadline=None, max_examples=40)
@given(problems(), st.integers(0, 7))
def test_the_heads_that_lose_most_are_dense(prediction, dense):
    """Choices that need more, or that leave nothing sparse, are left out; each layout is there once, best first."""
    counts = {choice: to_fill(prediction, choice, dense) for choice in every_choice(prediction)}
    expected = [least(prediction, choice, count) for choice, count in counts.items() if count is not None]
    found = prediction.layouts(counts, dense)
    assert len({*found}) == len(found)
    assert {*found} == {normal(prediction, pairs) for pairs in expected}
    losses = [layout.loss for layout in found]
    assert losses == sorted(losses)


@few
@given(problems(), st.data())
def test_prefixes_of_the_filling_are_fillings(prediction, data):
    """With one layer more to be dense, what was dense stays so."""
    choice = data.draw(st.sampled_from(every_choice(prediction)))
    before = None
    for dense in range(1, len(prediction.layers)):
        for layout in prediction.layouts([choice], dense):
            sparse = {*left_sparse(prediction, layout)}
            assert before is None or sparse < before
            before = sparse


def test_choices_are_filled_as_if_alone():
    """However many there are, and in any order, of choices and of the layers in one."""
    generator = torch.Generator().manual_seed(0)
    prediction = Prediction(torch.rand(8, 8, 2, generator=generator, dtype=torch.float64), range(3, 27, 3))
    choices = every_choice(prediction)
    found = prediction.layouts(choices, 5)
    alone = [layout for choice in choices for layout in prediction.layouts([choice], 5)]
    assert {*found} == {*alone} and len(alone) > len(found)
    assert prediction.layouts([choice[::-1] for choice in reversed(choices)], 5) == found


# Three layers read layer 4 alike: heads of layers 7, 9 and 12.
ALIKE = torch.zeros(4, 4, 2, dtype=torch.float64)
ALIKE[:, 1:] = torch.tensor([[1.0, 2.0], [9.0, 8.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("choice", "dense", "expected", "loss"),
    [
        ((4,), 1, Layout((), (4,)), 27),
        ((4,), 2, Layout((9,), (4,)), 10),
        # Layer 9 selects, and its only readers become dense.
        ((4, 9), 3, Layout((9, 12), (4,)), 3),
        ((4,), 3, Layout((9, 12), (4,)), 3),
        # Layer 4 selects, but layer 7 does so again.
        ((4, 7), 3, Layout((4, 9), (7,)), 7),
        # Layers before the first that selects are full.
        ((9,), 3, Layout((4, 7), (9,)), 7),
    ],
)
def test_layouts_by_hand(choice, dense, expected, loss):
    (found,) = Prediction(ALIKE, [4, 7, 9, 12]).layouts([choice], dense)
    assert found == expected and found.loss == pytest.approx(loss)


def test_single_heads_by_hand():
    losses = ALIKE.clone()
    losses[:, 2, 1] = 0.5
    (found,) = Prediction(losses, [4, 7, 9, 12]).layouts([(4,)], 2)
    assert found == Layout((), (4,), (KVHead(9, 0), KVHead(12, 1)))
    assert found.loss == pytest.approx(1 + 2 + 0.5 + 3)


def test_choices_that_are_too_many_or_leave_nothing_are_left_out():
    prediction = Prediction(ALIKE, [4, 7, 9, 12])
    assert prediction.layouts([(12,), (9, 12), (4, 7, 9, 12), (7, 9), (4, 9, 12)], 2) == []
    assert prediction.layouts([(12,), (4, 7, 9, 12)], 4) == prediction.layouts([(4,), (9,)], 4) == []
    assert prediction.layouts([(4,)], 0) == []


@few
@given(problems(), st.data())
def test_layers_alone_have_no_full_heads(prediction, data):
    """With one KV head a layer, whole layers are dense."""
    layers = Prediction(prediction.losses.sum(2, keepdim=True), prediction.layers)
    dense = data.draw(st.integers(1, len(layers.layers) - 1))
    found = [*layers.layouts(every_choice(layers), dense), search(layers, dense)]
    assert all(not layout.full_heads and len(layout.full + layout.select) == dense for layout in found)


@few
@given(problems(), st.data())
def test_of_some_choices_only_the_best_are_built(prediction, data):
    dense, most = data.draw(st.integers(1, len(prediction.layers) - 1)), data.draw(st.integers(1, 5))
    every = prediction.layouts(every_choice(prediction), dense)
    best = prediction.layouts(every_choice(prediction), dense, most)
    assert 1 <= len(best) <= most and {*best} <= {*every}
    assert [x.loss for x in best] == pytest.approx([x.loss for x in every[: len(best)]])
    near = neighbours(every[0], prediction, dense)
    some = neighbours(every[0], prediction, dense, most)
    assert len(some) <= most and {*some} <= {*near}
    assert [x.loss for x in some] == pytest.approx([x.loss for x in near[: len(some)]])


@settings(deadline=None, max_examples=15)
@given(problems(most=5), st.data())
def test_neighbours_are_all_choices_one_step_away(prediction, data):
    """One layer more selects, one less, or another one instead; the layout itself is none of them."""
    dense = data.draw(st.integers(1, len(prediction.layers) - 1))
    for layout in prediction.layouts(every_choice(prediction), dense):
        own, near = {*layout.select}, []
        for choice in every_choice(prediction):
            more, less = len({*choice} - own), len(own - {*choice})
            if {more, less} <= {0, 1} and (more or less):
                near.append(choice)
        found = neighbours(layout, prediction, dense)
        assert {*found} == {*prediction.layouts(near, dense)} - {layout}
        assert layout not in found and len({*found}) == len(found)
        losses = [other.loss for other in found]
        assert losses == sorted(losses)


@few
@given(problems(), st.data())
def test_exchanges_swap_a_dense_head_for_a_sparse_one(prediction, data):
    """All of them, with the loss of the definition, best first."""
    count = len(prediction.layers)
    layout = data.draw(
        st.sampled_from(prediction.layouts(every_choice(prediction), data.draw(st.integers(2, count - 1))))
    )
    sparse = left_sparse(prediction, layout)
    pairs = [(by, to, head) for by, to, head in readers(prediction, layout.select)]
    expected = {}
    for gone in [pair for pair in pairs if pair not in sparse]:
        for come in sparse:
            now = [pair for pair in (*sparse, gone) if pair != come]
            expected[normal(prediction, now)] = loss_of(prediction, now)
    found = prediction.exchanges(layout)
    losses = [other.loss for other in found]
    assert losses == sorted(losses)
    assert len(found) == min(len(expected), layouts.EXCHANGES)
    for other in found:
        key = normal(prediction, left_sparse(prediction, other))
        assert other.loss == pytest.approx(expected[key])
    if expected:
        assert losses[0] == pytest.approx(min(expected.values()))


@settings(deadline=None, max_examples=10)
@given(problems(), problems(fewest=8, most=10))
def test_search_goes_to_the_best_neighbour_while_there_is_a_better_one(few, many):
    """It is never worse than the best in which one or two layers select."""
    for prediction in (few, many):
        for dense in range(1, len(prediction.layers)):
            found = search(prediction, dense)
            layout = prediction.layouts(every_choice(prediction, most=2), dense)[0]
            assert found.loss <= layout.loss
            assert found.loss == pytest.approx(loss_of(prediction, left_sparse(prediction, found)), abs=1e-10)
            assert all(other.loss >= found.loss for other in neighbours(found, prediction, dense))
            while better := [x for x in neighbours(layout, prediction, dense) if x.loss < layout.loss]:
                layout = min(better, key=lambda x: x.loss)
            assert found == layout


@few
@given(problems(), st.data())
def test_what_is_lost_stands_in_its_places(prediction, data):
    dense = data.draw(st.integers(1, len(prediction.layers) - 1))
    place = prediction.layers.index
    for layout in prediction.layouts(every_choice(prediction), dense):
        expected = torch.zeros_like(prediction.losses)
        for by, to, head in left_sparse(prediction, layout):
            expected[place(by), place(to), head] = prediction.losses[place(by), place(to), head]
        assert torch.equal(prediction.lost(layout), expected)


# Predictions that learn


def test_nothing_measured_corrects_nothing():
    prediction = Prediction(ALIKE, [4, 7, 9, 12])
    assert prediction.corrected({}) is prediction


def test_what_loses_nothing_can_be_learnt_from():
    """Divergences may round to 0 or below it, and gradients may all be 0."""
    prediction = Prediction(ALIKE, [4, 7, 9, 12])
    found = prediction.layouts([(4,), (4, 9)], 2)
    corrected = prediction.corrected(dict.fromkeys(found, -1e-9))
    assert corrected.losses.isfinite().all() and float(corrected.losses.max()) < 1e-4
    nothing = Prediction(torch.zeros_like(ALIKE), [4, 7, 9, 12])
    assert not nothing.corrected(dict.fromkeys(found, 0.1)).losses.any()


@few
@given(problems(fewest=4), st.floats(0.2, 5))
def test_a_common_factor_is_learnt_from_one_layout(prediction, factor):
    """If all losses are so many times what was predicted, all are corrected alike."""
    layout = prediction.layouts(every_choice(prediction), 1)[0]
    found = prediction.corrected({layout: factor * layout.loss})
    assert torch.allclose(found.losses, factor * prediction.losses, rtol=1e-9)
    assert found.layers == prediction.layers


def test_a_layer_that_selects_worse_than_predicted_is_found_out():
    """And a head that bears it worse; layouts that were not measured are then predicted well."""
    generator = torch.Generator().manual_seed(3)
    draws = [
        Prediction(torch.rand(6, 6, 2, generator=generator, dtype=torch.float64) + 0.2, range(6)) for _ in range(5)
    ]
    prediction, truth = draws[0], draws[0].losses.clone()
    truth[1] *= 2.5
    truth[:, 4, 0] += 2 * prediction.losses[:, 4, 0]
    every = [*dict.fromkeys(x for draw in draws for n in (1, 2) for x in draw.layouts(every_choice(draw), n))]
    actual = {layout: float((prediction.lost(layout) > 0).mul(truth).sum()) for layout in every}
    measured = {layout: actual[layout] for layout in every[::2]}
    corrected = prediction.corrected(measured)
    rest = every[1::2]
    errors = [
        sum(abs(float(which.lost(x).sum()) / actual[x] - 1) for x in rest) / len(rest)
        for which in (prediction, corrected)
    ]
    assert errors[1] < errors[0] / 2
    ratio = corrected.losses / prediction.losses
    assert ratio[1].mean() > 1.5 * ratio[0].mean()
    assert ratio[0, 4, 0] > 1.05 * ratio[0, 4, 1]


def test_factors_may_have_any_sign():
    """What goes with losses, by layer that selects, is told apart: answers may be lost or won."""
    generator = torch.Generator().manual_seed(4)
    prediction = Prediction(torch.rand(5, 5, 2, generator=generator, dtype=torch.float64), range(5))
    truth = prediction.losses * torch.tensor([3.0, -2.0, 1.0, 0.5, 0.0])[:, None, None]
    every = [x for n in (1, 2) for x in prediction.layouts(every_choice(prediction), n)]
    actual = {x: float((prediction.lost(x) > 0).mul(truth).sum()) for x in every}
    assert min(actual.values()) < 0 < max(actual.values())
    factors = prediction.factors(dict([*actual.items()][::2]), {x: x.loss for x in every})
    learnt = replace(prediction, losses=prediction.losses * factors)
    errors = [abs(float(learnt.lost(x).sum()) - actual[x]) / x.loss for x in every[1::2]]
    assert sum(errors) / len(errors) < 0.2


@few
@given(problems(fewest=4), st.data())
def test_corrections_are_the_least_squares_of_relative_errors(prediction, data):
    """With the ridge: no other corrections have a smaller sum of squares of errors and of themselves."""
    every = prediction.layouts(every_choice(prediction), 2)
    few = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=6, unique=True))
    measured = {layout: layout.loss * data.draw(st.floats(0.8, 1.25)) for layout in few}
    count, heads = prediction.losses.shape[1:]
    lost = torch.stack([prediction.lost(x) / y for x, y in measured.items()])
    predicted = lost.sum((1, 2, 3))
    factor = predicted.sum() / predicted.square().sum()

    def cost(corrections):
        by, to = corrections.split([count, count * heads])
        factors = factor + by[:, None, None] + to.view(count, heads)
        return ((lost * factors).sum((1, 2, 3)) - 1).square().sum() + layouts.RIDGE * corrections.square().sum()

    zero = torch.zeros(count * (1 + heads), dtype=torch.float64)
    best = torch.linalg.solve(torch.func.hessian(cost)(zero), -torch.func.grad(cost)(zero))
    by, to = best.split([count, count * heads])
    factors = factor + by[:, None, None] + to.view(count, heads)
    expected = prediction.losses * factors.clamp(min=layouts.LEAST * float(factors.median()))
    assert torch.allclose(prediction.corrected(measured).losses, expected, rtol=1e-8)


def test_a_correction_never_makes_a_loss_a_gain():
    """However far below the prediction one layout is."""
    generator = torch.Generator().manual_seed(5)
    prediction = Prediction(torch.rand(5, 5, 1, generator=generator, dtype=torch.float64), range(5))
    low, *others = prediction.layouts(every_choice(prediction), 2)
    corrected = prediction.corrected({low: 1e-6 * low.loss, **{x: 100 * x.loss for x in others}})
    assert (corrected.losses > 0).all()


# Layouts


@few
@given(problems(), st.data())
def test_layouts_are_those_of_the_policy(prediction, data):
    """As options, and as calibration writes them down."""
    kv_heads = prediction.losses.shape[2]
    dense = data.draw(st.integers(1, len(prediction.layers) - 1))
    windows = tuple(None if layer in prediction.layers else 9 for layer in range(40))
    for layout in prediction.layouts(every_choice(prediction, most=2), dense):
        content = {"version": VERSION, "tidal": layout.as_json()}
        spec = ModelSpec(40, windows, vocab_size=9, context_limit=99, kv_heads=kv_heads, calibration=content)
        policy = Tidal(**layout.options).resolve(spec)
        assert policy == Tidal().resolve(spec)
        assert (policy.full, policy.selecting, policy.full_heads) == (layout.full, layout.select, layout.full_heads)


def test_a_layout_as_options_and_as_json():
    layout = Layout((0, 3), (1, 5, 9), (KVHead(2, 1), KVHead(4, 0)), loss=0.5)
    heads = (KVHead(2, 1), KVHead(4, 0))
    assert layout.options == {"full": (0, 3), "full_heads": heads, "select": 1, "reselect": (5, 9)}
    assert layout.as_json() == {"full": [0, 3], "select": [1, 5, 9], "full_heads": [[2, 1], [4, 0]]}


def test_layouts_are_equal_that_are_dense_alike():
    layout = Layout((0,), (1,), (KVHead(2, 1),), loss=0.5)
    same, other = Layout((0,), (1,), (KVHead(2, 1),), loss=0.7), Layout((0,), (1,), (KVHead(2, 0),), loss=0.5)
    assert layout == same and hash(layout) == hash(same) and layout != other
