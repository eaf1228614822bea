"""What a drafter is: it proposes the tokens to try next.

A drafter holds weights and options. What it remembers of a sequence lives in that sequence's draft state, which rides
on the sequence's segments as ``segment.draft``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from springtide.drafting.tree import TokenTree
from springtide.rows.cache import Cache
from springtide.rows.segment import Segment
from springtide.rows.spec import ModelSpec


class Target(Protocol):
    """The model that drafts are for (:class:`springtide.model.stack.Stack`)."""

    model: Any
    spec: ModelSpec

    @property
    def fingerprint(self) -> str: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def rotate(self, layer: int, q: Tensor, positions: Sequence[int]) -> Tensor: ...
    def norm(self, hidden: Tensor) -> Tensor: ...
    def head(self, normed: Tensor) -> Tensor: ...
    def read(self, tokens: Sequence[int]) -> Cache: ...


@dataclass(frozen=True)
class View:
    """What a drafter sees of a request when it is asked for a draft.

    Attributes:
        tokens: the committed ones, prompt and output; the last of them is in no cache yet.
        depth: how deep the tree may be; what is deeper is cut off.
        draft: the drafter's own state of the request.
        cache, policy, state: the request's cache, its policy, and the policy's state.
        gaps: how far the tokens' positions are beyond their places, where a prompt's first rows left some out.
        way: which of the drafter's ways is wanted, from 0; it is the same for all requests of a call.
        request: the request itself (:class:`springtide.engine.request.Request`), for drafters that run others like it.
    """

    tokens: Sequence[int]
    depth: int
    draft: Any
    cache: Cache
    policy: Any
    state: Any
    gaps: int = 0
    way: int = 0
    request: Any = None


@dataclass(frozen=True)
class Growth:
    """Rows that are added to a segment in mid-pass.

    Attributes:
        parents: the rows that the new ones follow.
        origins: those whose hidden states theirs were made of, whose choice of slots a policy takes over.
        rows: their hidden states ``[n, hidden]``.
    """

    parents: Sequence[int]
    origins: Sequence[int]
    rows: Tensor


class Drafter:
    """Plain decoding, and the base of every drafter."""

    name: ClassVar[str] = "none"

    @property
    def ways(self) -> Sequence[str]:
        """Names of the ways in which it can draft, such as how far ahead; they all lead to the same output."""
        return (self.name,)

    def using(self, way: int) -> Drafter:
        """The drafter whose way that is: itself, if it is not made of others."""
        return self

    @property
    def gain(self) -> float | None:
        """How many times as fast as plain decoding it is predicted to be; None where that is not known."""
        return None

    def resolve(self, target: Target) -> Self:
        """The drafter, ready for ``target``; raises SpringtideError if it was made for another model."""
        return self

    def tuned(self, cost: Callable[[int], float]) -> Self:
        """The drafter with trees that suit what rows cost: ``cost(n)`` is the time of a pass of n rows."""
        return self

    @property
    def most_rows(self) -> int:
        """Rows that a pass has for a request that is drafted for, at most."""
        return 1

    @property
    def branch_rows(self) -> int:
        """Rows that it writes to a branch of a request's cache while it makes a draft, at most."""
        return 0

    def memory(self, tokens: int) -> int:
        """Bytes that the draft state of a request of so many tokens takes at most, where it grows with them."""
        return 0

    def new_state(self) -> Any:
        """Draft state of a request of which nothing was computed yet; copied when the request is forked."""
        return None

    def branch(self, state: Any, tokens: Sequence[int]) -> Any:
        """The draft state of a request that goes on from ``tokens``, and of which nothing will stay."""
        return copy(state)

    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        """For each request a tree whose node 0 is the last of its tokens."""
        return [TokenTree.single(view.tokens[-1]) for view in views]

    @property
    def observes(self) -> bool:
        """Whether it wants to see the queries of the passes that it drafts for, as :attr:`Segment.queries`."""
        return False

    @property
    def grows(self) -> Sequence[int]:
        """Layers before which it adds rows in mid-pass, ascending; one entry for each time."""
        return ()

    def grow(self, number: int, segments: Sequence[Segment], hidden: Sequence[Tensor]) -> list[Growth]:
        """What is added to each segment the ``number``-th time, from 0; ``hidden [rows, hidden]`` are its rows'."""
        raise NotImplementedError

    def commit(self, segment: Segment, hidden: Tensor, kept: Sequence[int]) -> None:
        """A pass is over: rows ``kept`` (ascending) stay; ``hidden [rows, hidden]`` are the segment's final states.

        Called when the last of these rows has been asked for the next token. What it followed is committed already.
        Rows that were added in mid-pass come last in ``hidden``; they are those of ``segment.drafter``, which may be
        another.
        """
