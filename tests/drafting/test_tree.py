"""Draft trees: what follows a node, and how deep they go."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.drafting.tree import TokenTree
from springtide.rows.segment import PREFIX


def test_a_child_follows_its_own_parent_with_its_own_token():
    tree = TokenTree([9, 1, 2, 1, 2, 1], [PREFIX, 0, 0, 1, 2, 3])
    children = {(node, token): tree.child(node, token) for node in range(6) for token in (1, 2, 9)}
    found = {(0, 1): 1, (0, 2): 2, (1, 1): 3, (2, 2): 4, (3, 1): 5}
    assert children == {place: found.get(place) for place in children}


def test_a_single_node_is_plain_decoding():
    assert TokenTree.single(7) == TokenTree([7], [PREFIX])
    assert TokenTree.single(7).child(0, 7) is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 6))
def test_a_limited_tree_has_the_nodes_down_to_that_depth(picks, depth):
    tree = TokenTree(list(range(len(picks) + 1)), [PREFIX, *(pick % (i + 1) for i, pick in enumerate(picks))])

    def trail(of, node):
        """Tokens from node 0 down: they tell the nodes of ``tree`` apart."""
        return (of.tokens[node],) if of.parents[node] == PREFIX else (*trail(of, of.parents[node]), of.tokens[node])

    limited = tree.limited(depth)
    whole = [trail(tree, node) for node in range(len(tree.tokens))]
    assert [trail(limited, node) for node in range(len(limited.tokens))] == [t for t in whole if len(t) <= depth + 1]
