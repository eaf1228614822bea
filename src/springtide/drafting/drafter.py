"""What a drafter is: it proposes the tokens to try next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from springtide.drafting.tree import TokenTree


class Drafter(Protocol):
    """Proposes a tree whose node 0 is the last committed token."""

    def propose(self, tokens: Sequence[int]) -> TokenTree:
        """A tree that continues ``tokens``, the committed tokens of one sequence."""
        ...


class Undrafted:
    """Plain decoding: the tree of one node."""

    def propose(self, tokens: Sequence[int]) -> TokenTree:
        return TokenTree.single(tokens[-1])
