"""What a row may see, by its definition."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.attention.policy import Policy
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.segment import PREFIX, Segment


@st.composite
def segments(draw):
    """Random trees (several rows may follow the prefix directly) behind a random prefix."""
    count, prefix = draw(st.integers(1, 12)), draw(st.integers(0, 30))
    if draw(st.booleans()):
        parents = list(range(-1, count - 1))
    else:
        parents = [draw(st.integers(PREFIX, row - 1)) for row in range(count)]
    return Segment(Cache(Pool(1)), prefix, [0] * count, parents, "decode", Policy())


def ancestors(segment, row):
    """The row and those above it."""
    return {row} if segment.parents[row] == PREFIX else {row} | ancestors(segment, segment.parents[row])


def may_see(segment, row, slot, window):
    """Slots of the prefix and those of the row's ancestors, less those ``window`` or more positions back."""
    if slot < segment.prefix:
        position = slot
    elif slot - segment.prefix in ancestors(segment, row):
        position = segment.prefix + len(ancestors(segment, slot - segment.prefix)) - 1
    else:
        return False
    own = segment.prefix + len(ancestors(segment, row)) - 1
    return window is None or own - position < window


@settings(deadline=None, max_examples=200)
@given(segments(), st.one_of(st.none(), st.integers(1, 40)))
def test_visible_is_its_definition(segment, window):
    expected = torch.tensor(
        [[may_see(segment, row, slot, window) for slot in range(segment.length)] for row in range(len(segment.tokens))]
    )
    seen = segment.seen(window)
    if seen.mask is None:
        assert expected.all()
    else:
        assert seen.mask.dtype == torch.bool and torch.equal(seen.mask, expected)
    assert seen.start == (0 if window is None else max(0, segment.prefix - window + 1))
    assert not expected[:, : seen.start].any()


@settings(deadline=None, max_examples=50)
@given(segments())
def test_positions_follow_the_parents(segment):
    for row, parent in enumerate(segment.parents):
        before = segment.prefix - 1 if parent == PREFIX else segment.positions[parent]
        assert segment.positions[row] == before + 1
    assert segment.length == segment.prefix + len(segment.tokens)


def test_a_chain_and_the_same_rows_given_as_a_tree_see_the_same():
    chain = Segment.chain(Cache(Pool(1)), 4, [7, 8, 9], "decode", Policy())
    tree = Segment(Cache(Pool(1)), 4, [7, 8, 9], [PREFIX, 0, 1], "decode", Policy())
    assert chain.positions == tree.positions == [4, 5, 6]
    assert torch.equal(chain.seen().mask, tree.seen().mask)
    assert torch.equal(chain.seen(2).mask, tree.seen(2).mask)


def test_one_row_needs_no_mask_unless_its_window_hides_something():
    one = Segment.chain(Cache(Pool(1)), 9, [1], "decode", Policy())
    assert one.seen().mask is None and one.seen(10).mask is None
    assert one.seen(9).mask.tolist() == [[False] + [True] * 9]


def test_masks_of_other_windows_and_of_changed_rows_are_not_mixed_up():
    segment = Segment.chain(Cache(Pool(1)), 2, [1, 2, 3], "decode", Policy())
    wide, narrow = segment.seen().mask, segment.seen(2).mask
    assert not torch.equal(wide, narrow)
    assert torch.equal(segment.seen().mask, wide)
    assert replace(segment, tokens=[1], parents=[PREFIX]).seen().mask is None
