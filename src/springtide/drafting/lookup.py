"""Prompt lookup: what followed the last tokens before, in the prompt or in the output, may follow them again."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from springtide.drafting.drafter import Drafter, Target, View
from springtide.drafting.tree import TokenTree
from springtide.errors import SpringtideError
from springtide.options import at_least, option

OCCURRENCES = 4  # of an n-gram, the latest ones, whose continuations are drafted
LONGEST = 2**16 - 1  # n-gram
TRUST = 2  # tokens that are drafted for each token of the n-gram


class Index:
    """Where the n-grams of a sequence end, for every place where something follows them.

    A hash table has the latest end of each n-gram, and every end leads to the one before it of the same n-gram. Of the
    tokens themselves it holds no more than the last ones: they are compared with those that the caller has. Where an
    n-gram occurs once, no longer ones are entered: they would tell the same. Rows that are no tokens (negative ids) are
    part of no n-gram.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest, self.longest = shortest, longest
        self._clear(0)

    def _clear(self, tokens: int) -> None:
        self._length, self._tail = 0, list[int]()
        self._entries = 0
        self._ends, self._sizes = _table(tokens)  # of each slot: the latest end of an n-gram, 0 if it is free, and n
        self._earlier = array("i")  # of each end, for every n from the shortest on: the end before it
        self._starts = array("i")  # of each end: where its own begin there

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(len(part) * part.itemsize for part in (self._ends, self._sizes, self._earlier, self._starts))

    def fork(self) -> Index:
        """An independent copy."""
        twin = Index(self.shortest, self.longest)
        vars(twin).update({name: value[:] if isinstance(value, array) else value for name, value in vars(self).items()})
        return twin

    __copy__ = fork

    def read(self, tokens: Sequence[int]) -> None:
        """Enter the tokens that are new; all of them if this is not the sequence that was read before."""
        if list(tokens[self._length - len(self._tail) : self._length]) != self._tail:
            self._clear(len(tokens))
        for end in range(self._length, len(tokens)):
            self._starts.append(len(self._earlier))
            for n in range(self.shortest, min(self.longest, end) + 1):
                if tokens[end - n] < 0 or not self._enter(tokens, end, n):
                    break
        self._length, self._tail = len(tokens), list(tokens[-self.longest :])

    def _enter(self, tokens: Sequence[int], end: int, n: int) -> bool:
        """Enter the n-gram at ``end``; whether it occurred before."""
        slot = self._slot(tokens, end, n)
        before = self._ends[slot]
        self._ends[slot], self._sizes[slot] = end, n
        if before:
            self._earlier.append(before)
            if not self._before(before, n) and n < min(self.longest, before) and tokens[before - n - 1] >= 0:
                self._enter(tokens, before, n + 1)  # what occurred once occurs twice
            return True
        self._entries += 1
        if 3 * self._entries > 2 * len(self._ends):
            self._enlarge(tokens)
        return False

    def _slot(self, tokens: Sequence[int], end: int, n: int) -> int:
        """The slot that has the n-gram at ``end``, or the free one where it belongs."""
        gram, mask = tokens[end - n : end], len(self._ends) - 1
        slot = hash(tuple(gram)) & mask
        while (at := self._ends[slot]) and not (self._sizes[slot] == n and tokens[at - n : at] == gram):
            slot = (slot + 1) & mask
        return slot

    def _before(self, end: int, n: int) -> int:
        """Where the n-gram at ``end``, which has been entered, ended before; 0 if it did not."""
        start, stop = self._starts[end], self._starts[end + 1] if end + 1 < len(self._starts) else len(self._earlier)
        return self._earlier[start + n - self.shortest] if n - self.shortest < stop - start else 0

    def _enlarge(self, tokens: Sequence[int]) -> None:
        entries = [(end, n) for end, n in zip(self._ends, self._sizes, strict=True) if end]
        self._ends, self._sizes = _table(len(self._ends))
        for end, n in entries:
            slot = self._slot(tokens, end, n)
            self._ends[slot], self._sizes[slot] = end, n

    def match(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """The length of the longest n-gram that ends ``tokens`` and occurs before, 0 if none does.

        With it come the places behind its latest occurrences, the last one first.
        """
        size, place, last = 0, 0, len(tokens)
        for n in range(self.shortest, min(self.longest, last) + 1):
            before = self._ends[self._slot(tokens, last, n)]
            if not before:
                break
            size, place = n, before
        length, places = size, list[int]()
        while place and len(places) < OCCURRENCES:
            places.append(place)
            place = self._before(place, size)
        while places and length < min(self.longest, places[0]) and tokens[places[0] - length - 1] >= 0:
            if tokens[places[0] - length - 1] != tokens[last - length - 1]:
                break
            length += 1
        return length, places


@dataclass(frozen=True)
class Frozen:
    """An index into which nothing is entered: n-grams of tokens that it does not have are looked up all the same."""

    index: Index

    def read(self, tokens: Sequence[int]) -> None:
        """Enter nothing."""

    def match(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """See :meth:`Index.match`."""
        return self.index.match(tokens)


def _table(entries: int) -> tuple[array[int], array[int]]:
    """Free slots, a power of two and more than ``entries``: ends and sizes."""
    slots = max(256, 1 << entries.bit_length())
    return array("i", bytes(4 * slots)), array("H", bytes(2 * slots))


@dataclass(frozen=True)
class Lookup(Drafter):
    """Drafts what followed the longest n-gram that ends the sequence and occurs in it before.

    This is prompt lookup decoding (Saxena, 2023) with trees: different continuations become branches, which grow level
    by level until the draft is twice as long as the n-gram, for a long match is right more often. Nothing is trained,
    and a step costs time for its new tokens only, whatever the length of the context.
    """

    name: ClassVar[str] = "lookup"

    ngram: int = option(8, "tokens of the longest n-gram that is looked up")
    min_ngram: int = option(1, "tokens of the shortest n-gram that is looked up")
    tokens: int = option(16, "tokens that are tried in a pass, at most")
    depth: int = option(16, "tokens ahead that are drafted, at most")

    def resolve(self, target: Target) -> Self:
        at_least(self.tokens, 1, f"{self.name}: tokens")
        at_least(self.depth, 1, f"{self.name}: depth")
        at_least(self.min_ngram, 1, f"{self.name}: min_ngram")
        if self.ngram < self.min_ngram:
            raise SpringtideError(
                f"{self.name}: ngram is {self.ngram}, but min_ngram is {self.min_ngram}; raise one or lower the other."
            )
        if self.ngram > LONGEST:
            raise SpringtideError(f"{self.name}: ngram is {self.ngram}, but it must be at most {LONGEST}.")
        return self

    @property
    def most_rows(self) -> int:
        return 1 + self.tokens

    def memory(self, tokens: int) -> int:
        """The places of every n-gram, and a table of them that is up to three times as large as it need be."""
        grams = self.ngram - self.min_ngram + 1
        return 1024 + tokens * (32 + 22 * grams)

    def new_state(self) -> Index:
        return Index(self.min_ngram, self.ngram)

    def branch(self, state: Index, tokens: Sequence[int]) -> Frozen:
        """Its n-grams are those of ``tokens``: what comes on the branch is not entered, since it would have to go."""
        state.read(tokens)
        return Frozen(state)

    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        return [self._propose(view.draft, view.tokens) for view in views]

    def _propose(self, index: Index | Frozen, tokens: Sequence[int]) -> TokenTree:
        index.read(tokens)
        length, places = index.match(tokens)
        return merged(tokens, places, min(self.tokens, TRUST * length), self.depth)


def merged(tokens: Sequence[int], starts: Sequence[int], most: int, depth: int) -> TokenTree:
    """What follows ``tokens`` if they go on as at ``starts``, in one tree: ``most`` tokens, level by level."""
    tree = TokenTree.single(tokens[-1])
    nodes: dict[tuple[int, int], int] = {}  # by parent and token
    reached = dict.fromkeys(starts, 0)
    for level in range(min(most, depth)):
        for start, parent in reached.items():
            token = tokens[start + level % (len(tokens) - start)]  # what reaches the end begins again: it is a loop
            if (parent, token) not in nodes:
                if len(nodes) == most:
                    return tree
                nodes[parent, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(parent)
            reached[start] = nodes[parent, token]
    return tree
