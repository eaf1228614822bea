"""Prompt lookup: what followed the last tokens before, in the prompt or in the output, may follow them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar, Self

from springtide.drafting.drafter import Drafter, Target, View
from springtide.drafting.tree import TokenTree
from springtide.options import at_least, option

OCCURRENCES = 4  # of an n-gram, the latest ones, whose continuations are drafted
TRUST = 2  # tokens that are drafted for each token of the n-gram


@dataclass
class Index:
    """Where the n-grams of a sequence end, for every place where something follows them.

    ``ends[gram]`` are the positions behind it, ascending. Where an n-gram occurs once, no longer ones are entered: they
    would tell the same. ``tail`` are the last of the ``length`` tokens that were read.
    """

    shortest: int
    longest: int
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    length: int = 0
    tail: list[int] = field(default_factory=list)

    def __copy__(self) -> Index:
        ends = {gram: list(places) for gram, places in self.ends.items()}
        return Index(self.shortest, self.longest, ends, self.length, self.tail)

    def read(self, tokens: Sequence[int]) -> None:
        """Enter the tokens that are new; all of them if this is not the sequence that was read before."""
        if list(tokens[self.length - len(self.tail) : self.length]) != self.tail:
            self.ends, self.length = {}, 0
        for end in range(self.length, len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                places = self.ends.setdefault(tuple(tokens[end - n : end]), [])
                places.append(end)
                if len(places) == 1:
                    break
                first = places[0]
                if len(places) == 2 and n < min(self.longest, first):
                    self.ends[tuple(tokens[first - n - 1 : first])] = [first]
        self.length, self.tail = len(tokens), list(tokens[-self.longest :])

    def match(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """The length of the longest n-gram that ends ``tokens`` and occurs before, and its places; 0 if none does."""
        places: list[int] = []
        for n in range(self.shortest, min(self.longest, len(tokens)) + 1):
            found = self.ends.get(tuple(tokens[-n:]))
            if found is None:
                break
            places = found
        if not places:
            return 0, []
        before, last = tokens[max(0, places[-1] - self.longest) : places[-1]], tokens[-self.longest :]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(before), reversed(last), strict=False))
        return len(list(same)), places


@dataclass(frozen=True)
class Lookup(Drafter):
    """Drafts what followed the longest n-gram that ends the sequence and occurs in it before.

    This is prompt lookup decoding (Saxena, 2023) with trees: different continuations become branches, which grow level
    by level until the draft is twice as long as the n-gram, for a long match is right more often. Nothing is trained,
    and a step costs time for its new tokens only, whatever the length of the context.
    """

    name: ClassVar[str] = "lookup"

    most: int = option(16, "tokens that are tried in a pass, at most")
    longest: int = option(8, "tokens of the longest n-gram that is looked up")
    shortest: int = option(1, "tokens of the shortest n-gram that is looked up")

    def resolve(self, target: Target) -> Self:
        at_least(self.most, 1, f"{self.name}: most")
        at_least(self.shortest, 1, f"{self.name}: shortest")
        at_least(self.longest, self.shortest, f"{self.name}: longest")
        return self

    def new_state(self) -> Index:
        return Index(self.shortest, self.longest)

    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        return [self._propose(view.draft, view.tokens) for view in views]

    def _propose(self, index: Index, tokens: Sequence[int]) -> TokenTree:
        index.read(tokens)
        length, places = index.match(tokens)
        return merged(tokens, places[: -OCCURRENCES - 1 : -1], min(self.most, TRUST * length))


def merged(tokens: Sequence[int], starts: Sequence[int], most: int) -> TokenTree:
    """What follows ``tokens`` if they go on as at ``starts``, in one tree: ``most`` tokens, level by level."""
    tree = TokenTree.single(tokens[-1])
    nodes: dict[tuple[int, int], int] = {}  # by parent and token
    reached = dict.fromkeys(starts, 0)
    for depth in range(most):
        for start, parent in reached.items():
            token = tokens[start + depth % (len(tokens) - start)]  # what reaches the end begins again: it is a loop
            if (parent, token) not in nodes:
                if len(nodes) == most:
                    return tree
                nodes[parent, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(parent)
            reached[start] = nodes[parent, token]
    return tree
